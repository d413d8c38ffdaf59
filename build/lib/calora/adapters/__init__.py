"""An adapter: a PEFT LoRA, the bypass beside it, and the folder that holds both."""
