"""LoRA files as image trainers write them, made small: kohya's names and shapes of Stable Diffusion 1.5."""

from pathlib import Path

MODULE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def kohya_file(path: Path, *, seed: int = 0, rank: int = 2, context: int = 768, **metadata: str) -> Path:
    """Write a LoRA of one module: its A [rank, context], B [16, rank] and alpha."""
    import numpy as np
    from safetensors.numpy import save_file

    numbers = np.random.default_rng(seed)
    tensors = {
        f"{MODULE}.lora_down.weight": numbers.standard_normal((rank, context), dtype=np.float32),
        f"{MODULE}.lora_up.weight": numbers.standard_normal((16, rank), dtype=np.float32),
        f"{MODULE}.alpha": np.array(float(rank), dtype=np.float32),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata=metadata or None)
    return path
