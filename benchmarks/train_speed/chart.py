"""Draws speed.svg from results.json and puts its figures into both READMEs; measures nothing."""

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BEGIN, END = "<!-- speed:begin -->\n", "<!-- speed:end -->"
PICTURE = "benchmarks/train_speed/speed.svg"


def sentences(result: dict[str, Any]) -> dict[str, str]:
    """Return the block of each README."""
    dense, real = result["ratio_dense_best"], result["ratio_real_best"]
    memory, full = result["memory_ratio_dense"], result["ratio_full"]
    return {
        "README.md": (
            f"![Tokens per second and peak memory of Haori, PEFT and full fine-tuning]({PICTURE})\n\n"
            f"SmolLM2-135M, rank 16 on all linear layers, {result['cpus']} cores, against PEFT with the Trainer of "
            f"transformers at the best setting found: {real:.1f} times the speed on the demo's reviews, whose rows "
            f"begin alike, and {dense:.1f} times on dense batches of 4 x 512 tokens, with {memory:.0%} of the memory "
            f"of its bf16 setting; {full:.1f} times the speed of full fine-tuning. How: "
            "[the fused path](docs/guide/fused-path.md).\n"
        ),
        "README.ja.md": (
            f"![Haori、PEFT、全体のファインチューニングの毎秒トークン数と最大メモリ]({PICTURE})\n\n"
            f"SmolLM2-135M、全線形層にランク16、{result['cpus']}コアでの測定です。transformers の Trainer と PEFT を"
            f"最速の設定で使った場合に比べ、書き出しが共通するデモのレビューでは{real:.1f}倍、4×512トークンの密なバッチでは"
            f"{dense:.1f}倍の速さです。メモリは PEFT の bf16 設定の{memory:.0%}、速さは全体のファインチューニングの"
            f"{full:.1f}倍です。仕組み: [融合パス](docs/guide/fused-path.md)\n"
        ),
    }


def write_readmes(result: dict[str, Any]) -> None:
    """Put the block between its marks in both READMEs."""
    for name, block in sentences(result).items():
        path = ROOT / name
        before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        _, _, after = rest.partition(END)
        path.write_text(f"{before}{BEGIN}{block}{END}{after}", encoding="utf-8")


def draw(result: dict[str, Any]) -> None:
    """Draw speed (dense and real) and peak memory as bars."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "haori"
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    FigureCanvasSVG(figure)
    panels = figure.subplots(1, 3)
    colors = {"Haori LoRA": "#2f5d8a", "Haori full, bf16": "#8a9aa8"}
    kinds = (
        ("dense", "tokens_per_s", 1, "4 x 512 tokens: tokens/s"),
        ("real", "tokens_per_s", 1, "the demo's reviews: tokens/s"),
        ("dense", "peak_bytes", 1e9, "4 x 512 tokens: peak memory, GB"),
    )
    for axes, (case, key, unit, title) in zip(panels, kinds, strict=True):
        systems = result[case]
        names = [name.replace(" (", "\n(").replace(", bf16", "\n(bf16)") for name in systems]
        values = [systems[name][key] / unit for name in systems]
        bars = axes.barh(names, values, color=[colors.get(name, "#c4502e") for name in systems])
        axes.bar_label(bars, fmt="%.0f" if unit == 1 else "%.1f", padding=3)
        axes.invert_yaxis()
        axes.set_title(title, fontsize=10)
        axes.set_xlim(0, 1.18 * max(values))
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "speed.svg", metadata={"Date": None})


if __name__ == "__main__":
    found = json.loads((HERE / "results.json").read_text())
    draw(found)
    write_readmes(found)
