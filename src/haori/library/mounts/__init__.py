"""Folders of LoRA files that stay where they are, such as `models/Lora` of AUTOMATIC1111's web UI."""
