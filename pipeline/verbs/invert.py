"""The verb `invert`: the noise from which a run's generator paints a given picture, and what the tuned one makes of it.

    invert/NAME/latents.safetensors    `first`, at the first time, and for `bdia` `second`, at the one after it
    invert/NAME/invert.json            the prompt, the method and how near the reconstruction comes
    invert/NAME/invert.png             original, reconstruction and the tuned model's version side by side

Equal settings, weights and pictures give equal files.
"""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.torch import save

from judges.images import open_image
from pipeline.forecast import fits
from pipeline.judging import told
from pipeline.loop import run_dir
from pipeline.progress import Progress, quiet_libraries
from pipeline.runner import process_state, states
from pipeline.settings import UserError
from pipeline.stages import STAGES
from pipeline.store import atomic_write_bytes, atomic_write_text

if TYPE_CHECKING:
    from models.generator import Generator
    from models.inversion import Inverted

_SIDE = 256  # pixels: smaller pictures are shown larger
_GAP = 8


@dataclass(frozen=True)
class Found:
    """How near the picture that is painted from the noise comes to the original: PSNR in dB, null where it is equal.

    `codec_psnr` is that of the codec alone, which no inversion can be better than; `tuned_psnr` that of the tuned
    model's version, where there is one.
    """

    image: str
    prompt: str
    method: str
    steps: int
    psnr: float | None
    codec_psnr: float | None
    tuned: bool
    tuned_psnr: float | None


@torch.no_grad()
def invert(config: Any, image: str | Path, prompt: str, to: str | Path | None = None) -> Found:
    """Invert the picture in the file `image`, into the folder `to` or one in the run's.

    A picture of another size than the generator's is cropped around its centre and scaled.

    Raises:
        UserError: the picture cannot be read, the settings do not suit the generator, or it takes more memory than
            there is.
    """
    fits("invert")(config)
    quiet_libraries()
    progress, device, settings = Progress(), str(process_state().device), config.invert
    try:
        picture = open_image(Path(image))
    except ValueError as error:
        raise UserError(str(error)) from None
    base, method = config.generator.build(device), settings.build()
    with told("invert"):
        times = base.times(settings.steps, settings.shift)
    original = _fitted(picture, base)
    latents = base.latents(original[None])
    with told("invert"):
        cond = base.encode([prompt])
        noise = method.invert(partial(base.predict, cond=cond), latents, times, base.vp)
    if not noise.first.isfinite().all():
        raise UserError(f"invert.method: {settings.method} found nothing finite; raise invert.steps, or take ddim")

    def painted(generator: "Generator") -> np.ndarray:
        return generator.decode(method.paint(partial(generator.predict, cond=cond), noise, times, generator.vp))[0]

    again, coded = painted(base), base.decode(latents)[0]
    learned, version = _learned(config), None
    if learned:
        base.to("cpu")  # two generators at once may not fit
        version = painted(config.generator.tuned(base, learned).to(device))
    else:
        progress.say(f"{run_dir(config)}: holds no result of finetune for these settings, so its version is left out")
    found = Found(
        image=str(image),
        prompt=prompt,
        method=settings.method,
        steps=settings.steps,
        psnr=psnr(original, again),
        codec_psnr=psnr(original, coded),
        tuned=version is not None,
        tuned_psnr=None if version is None else psnr(original, version),
    )
    folder = Path(to) if to else run_dir(config) / "invert" / Path(image).stem
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder, found, noise, original, again, version)
    progress.say(f"PSNR {_decibels(found.psnr)}, codec alone {_decibels(found.codec_psnr)}")
    for name in ("latents.safetensors", "invert.json", "invert.png"):
        progress.say(str(folder / name))
    return found


def _learned(config: Any) -> Path | None:
    """The folder of what the run tuned, where that stands, whole and by these settings."""
    folder = run_dir(config)
    standing = [entry.stage.name for entry in states(config, STAGES, folder) if entry.state == "reuse"]
    return folder / "finetune" / config.finetune.kept_folder if "finetune" in standing else None


def psnr(original: np.ndarray, other: np.ndarray) -> float | None:
    """Peak signal-to-noise ratio of two uint8 pictures in dB; None where they are equal."""
    error = float(np.square(original.astype(float) - other).mean())
    return 10 * math.log10(255**2 / error) if error else None


def sheet(panels: Sequence[tuple[np.ndarray, Sequence[str]]]) -> Image.Image:
    """Pictures of one size side by side, uint8 (H, W, 3), each with the lines of its caption below."""
    height, width = panels[0][0].shape[:2]
    larger = math.ceil(_SIDE / min(height, width))
    height, width = larger * height, larger * width
    size = max(12, width // 20)
    font = ImageFont.load_default(size)
    lines = max(len(caption) for _, caption in panels)
    below = lines * round(1.3 * size) + _GAP
    page = Image.new("RGB", (len(panels) * (width + _GAP) + _GAP, height + 2 * _GAP + below), "white")
    draw = ImageDraw.Draw(page)
    for place, (image, caption) in enumerate(panels):
        left = _GAP + place * (width + _GAP)
        page.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (left, _GAP))
        for row, line in enumerate(caption):
            draw.text((left, height + 2 * _GAP + row * round(1.3 * size)), line, fill="black", font=font)
    return page


def _fitted(picture: np.ndarray, generator: "Generator") -> np.ndarray:
    """In the size that the generator paints."""
    height, width = generator.pixel_shape
    if picture.shape[:2] == (height, width):
        return picture
    return np.array(ImageOps.fit(Image.fromarray(picture), (width, height), Image.Resampling.LANCZOS))


def _write(
    folder: Path, found: Found, noise: "Inverted", original: np.ndarray, again: np.ndarray, version: np.ndarray | None
) -> None:
    tensors = {"first": noise.first, "second": noise.second}
    kept = {name: values[0].cpu().contiguous() for name, values in tensors.items() if values is not None}
    atomic_write_bytes(folder / "latents.safetensors", save(kept))
    atomic_write_text(folder / "invert.json", json.dumps(asdict(found), indent=2, ensure_ascii=False) + "\n")
    panels = [
        (original, ["original"]),
        (again, ["reconstruction", f"{found.method}, {found.steps} steps", f"PSNR {_decibels(found.psnr)}"]),
    ]
    if version is not None:
        panels.append((version, ["tuned model", "from the same noise", f"PSNR {_decibels(found.tuned_psnr)}"]))
    shown = io.BytesIO()
    sheet(panels).save(shown, "PNG")
    atomic_write_bytes(folder / "invert.png", shown.getvalue())


def _decibels(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.1f} dB"
