"""How each method is called and drawn, everywhere: Okabe and Ito's colours and a marker each, safe for colour-blind readers and in print."""

from __future__ import annotations

from dataclasses import dataclass

BLACK = "#010101"  # told apart from SVG's default, which nobody writes


@dataclass(frozen=True)
class Look:
    """A method's label, its colour and its marker."""

    label: str
    colour: str
    marker: str


LOOKS = {
    "llm": Look("LLM", "#56B4E9", "s"),
    "llm_lora": Look("LLM + LoRA (teacher)", "#009E73", "s"),
    "small_lora": Look("small model + LoRA", "#CC79A7", "^"),
    "clm": Look("CLM", BLACK, "v"),
    "clm_inherited": Look("CLM + inherited LoRA", "#D55E00", "D"),
    "clm_lora_same": Look("CLM + LoRA (teacher's shape)", "#999999", "P"),
    "clm_lora_qk": Look("CLM + LoRA (q, k)", "#999999", "X"),
    "clm_lora": Look("CLM + LoRA (equal budget)", "#E69F00", "o"),
    "clm_wide": Look("CLM + CA-LoRA (non-linear, rank 32)", "#56B4E9", "X"),
    "clm_paper": Look("CLM + CA-LoRA (the paper's form)", "#F0E442", "X"),
    "clm_calora": Look("CLM + CA-LoRA", "#0072B2", "*"),
    "clm_calora_unlabelled": Look("CLM + CA-LoRA, no label", "#56B4E9", "*"),
    "clm_calora_written": Look("CLM + CA-LoRA, texts of the teacher's own", "#009E73", "*"),
    "clm_calora_written_free": Look("CLM + CA-LoRA, no step, no text", "#009E73", "D"),
    "clm_calora_free": Look("CLM + CA-LoRA, no step", "#0072B2", "D"),
    "clm_calora_scales": Look("CLM + scales (PEQA)", "#CC79A7", "s"),
    "clm_no_recover": Look("CLM + inherited LoRA, distilled", "#D55E00", "X"),
}
OTHERS = [(colour, marker) for marker in "<>phd8" for colour in ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")]


METRICS = {
    "accuracy": "accuracy", "f1": "F1", "macro_f1": "macro F1", "matthews": "Matthews", "em": "exact match",
    "agreement": "agreement with the teacher", "score": "score",
}  # fmt: skip


def key_of(method: str) -> str:
    """Under which name results hold a method: those of the compressed model (CLM) begin with clm."""
    return method if method.split("_")[0] == "clm" else f"clm_{method}"


def look_of(key: str) -> Look:
    """The look of a method in results; one without an entry gets a colour and a marker by its name."""
    if key in LOOKS:
        return LOOKS[key]
    place = sum(key.encode()) % len(OTHERS)
    return Look(f"CLM + {key.removeprefix('clm_').replace('_', ' ')}", *OTHERS[place])
