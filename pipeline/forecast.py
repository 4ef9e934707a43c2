"""What a run will take, from settings alone: memory in each stage, and the time of a network call.

Weights are counted from the geometry of every model (`models.geometry`), activations by calls of two rows on the meta
device (`models.metering`), as every further row takes as much. Nothing is loaded.

These are lower bounds: what kernels take for a while, what an allocator loses between blocks, and what CUDA keeps for
itself (about half a GiB) come on top, and so does what a judge and a reward model take besides their weights.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch
from diffusers.loaders import PeftAdapterMixin
from rich.console import Console
from rich.table import Table
from torch import nn

from models import adapters, lora, metering
from models.geometry import Geometry, Unknown, asked, cell, geometry, latent
from models.metering import Cost
from pipeline.judging import EnsembleJudge, ServerModel
from pipeline.settings import UserError

GIB = 2**30

SHARE = 0.45
"""Of a device's matmul rate, what a network's call is taken to reach."""

_ROWS = 2
_SERVED_SHARE = 0.9
"""Of a device, what vLLM takes unless it is told otherwise."""

_ROOM = "--gpu-memory-utilization"


@dataclass(frozen=True)
class Need:
    """Of one stage, in bytes: `held` all the time by what for, and the `phases`, one after another.

    `notes` say what is not in it.
    """

    stage: str
    held: dict[str, int]
    phases: dict[str, int]
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """The most at once."""
        return sum(self.held.values()) + max(self.phases.values(), default=0)


@dataclass
class _Kept:
    """What judges and reward models take, and what is not known of them."""

    judge: int = 0
    reward: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Networks:
    """The networks of a generator on the meta device, and how it is asked by default."""

    looks: Geometry
    codec: nn.Module
    encoders: tuple[nn.Module, ...]
    targets: tuple[str, ...]
    scale: float
    max_tokens: int | None
    size: tuple[int, int]

    @property
    def native(self) -> bool:
        return self.looks.pipeline is None


@functools.cache
def _networks(checkpoint: str, revision: str | None) -> _Networks:
    """Raises Unknown where nothing tells what it looks like."""
    looks = geometry(checkpoint, revision)
    if looks.pipeline not in (None, *adapters.FAMILIES):
        raise Unknown(f"{checkpoint} is a {looks.pipeline}; supported are {', '.join(adapters.FAMILIES)}")
    network, codec = looks.network.build(), looks.codec.build()
    family: Any = getattr(adapters, adapters.FAMILIES[looks.pipeline]) if looks.pipeline else network
    side = network.config.get("size") or network.config.get("sample_size") or 1024 // cell(codec)
    return _Networks(
        looks=looks,
        codec=codec,
        encoders=tuple(part.build() for part in looks.encoders),
        targets=family.targets(network) if looks.pipeline else network.lora_targets,
        scale=getattr(family, "scale", 1.0),
        max_tokens=getattr(family, "max_tokens", None),
        size=(side * cell(codec), side * cell(codec)),
    )


@functools.cache
def _network(checkpoint: str, revision: str | None, dtype: torch.dtype) -> nn.Module:
    return geometry(checkpoint, revision).network.build().to(dtype)


@functools.cache
def _learner(
    checkpoint: str,
    revision: str | None,
    dtype: torch.dtype,
    adapter: tuple[int, tuple[str, ...]] | None,
    checkpointed: bool,
) -> nn.Module:
    """The network with what is trained of it: an adapter of a rank on targets, or all."""
    network = geometry(checkpoint, revision).network.build()
    if adapter is None:
        network.requires_grad_(True)
    else:
        if not isinstance(network, PeftAdapterMixin):  # diffusers' PixArt and DiT
            network.__class__ = type(type(network).__name__, (type(network), PeftAdapterMixin), {})
        with torch.device("meta"):
            lora.attach(network, adapter[1], adapter[0], adapter[0], seed=0)
    if checkpointed:
        network.enable_gradient_checkpointing()
    return network.to(dtype)


@functools.cache
def _cost(network: nn.Module, size: tuple[int, int], tokens: int, learning: bool) -> Cost:
    """Of `_ROWS` rows."""
    call = metering.learned if learning else metering.painted
    return call(network, asked(network, _ROWS, size, tokens))


@functools.cache
def _decoding(codec: nn.Module, height: int, width: int, dtype: torch.dtype) -> Cost:
    """Of one picture."""
    codec = codec.to(dtype)
    return metering.painted(codec, {"z": latent(codec, 1, height, width, dtype)}, lambda z: codec.decode(z))


@dataclass(frozen=True)
class Painter:
    """The generator of a run's settings, as it is asked in them."""

    config: Any

    @property
    def _settings(self) -> Any:
        return self.config.generator

    @property
    def _looks(self) -> _Networks:
        return _networks(self._settings.checkpoint, self._settings.revision)

    @property
    def dtype(self) -> str:
        """In which the network computes where it learns."""
        trained = self.config.finetune.dtype
        return trained if trained != "float32" else self._settings.dtype

    @property
    def size(self) -> tuple[int, int]:
        """Of a picture: height and width in pixels."""
        given = self._settings.resolution or self._looks.size
        return (given, given) if isinstance(given, int) else tuple(given)

    @property
    def guided(self) -> bool:
        """Whether every picture is two rows of a call."""
        given = self._settings.guidance
        scale = self._looks.scale if given is None else getattr(given, "scale", given)
        return scale != 1

    @property
    def weights(self) -> int:
        """Bytes of the network."""
        place = self._settings.checkpoint, self._settings.revision
        return metering.size(_network(*place, getattr(torch, self._settings.dtype)))

    @property
    def encoders(self) -> int:
        return sum(metering.size(one, getattr(torch, self._settings.text_dtype)) for one in self._looks.encoders)

    @property
    def codec(self) -> int:
        return metering.size(self._looks.codec, getattr(torch, self._settings.codec_dtype))

    @property
    def offloads(self) -> bool:
        """Whether text encoders and codec are on the device only while they are used."""
        return self._settings.offload and not self._looks.native

    def decoding(self, pictures: int) -> int:
        """Bytes besides the codec's own: pictures are decoded one by one, and so many kept as numbers."""
        height, width = self.size
        dtype = getattr(torch, self._settings.codec_dtype)
        one = _decoding(self._looks.codec, height, width, dtype).bytes
        each = 3 * height * width * (dtype.itemsize + 2 * torch.float32.itemsize)
        return one + pictures * each

    def painting(self, pictures: int) -> Cost:
        """A call of the network for so many pictures, without a gradient."""
        network = _network(self._settings.checkpoint, self._settings.revision, getattr(torch, self._settings.dtype))
        return self._asked(network, pictures, learning=False)

    def learning(self, pictures: int) -> Cost:
        """A call and its backward pass, as `finetune` makes them."""
        return self._asked(self._learner, pictures, learning=True)

    @property
    def trained(self) -> int:
        """How many numbers are trained."""
        return sum(weight.numel() for weight in self._learner.parameters() if weight.requires_grad)

    @property
    def _learner(self) -> nn.Module:
        settings = self.config.finetune
        adapter = settings.lora and (settings.lora.rank, tuple(settings.lora.targets or self._looks.targets))
        place = self._settings.checkpoint, self._settings.revision, getattr(torch, self.dtype)
        return _learner(*place, adapter, settings.gradient_checkpointing)

    def _asked(self, network: nn.Module, pictures: int, learning: bool) -> Cost:
        per_cell, (height, width) = cell(self._looks.codec), self.size
        size = height // per_cell, width // per_cell
        tokens = self._looks.looks.text_tokens
        if self._settings.max_tokens and self._looks.max_tokens:
            tokens += self._settings.max_tokens - self._looks.max_tokens
        rows = pictures * (2 if self.guided else 1)
        return _cost(network, size, tokens, learning).times(rows / _ROWS)


def needs(config: Any, processes: int, memory: int) -> list[Need]:
    """Of each stage that a run of `config` has a use for, in order; bytes a process.

    Args:
        memory: bytes of the device, of which a judge that is served on it takes a share.

    Raises:
        Unknown: nothing tells what the generator looks like.
    """
    painter = Painter(config)
    kept = _kept(config, memory)
    sampled = [] if config.prefer.table else [_painting("sample", painter, config.sample, {})]
    judged = [] if config.prefer.table else [Need("judge", {"judge": kept.judge}, {})]
    notes, copies = tuple(kept.notes), 1 if painter.offloads else 2
    return [
        *sampled,
        *judged,
        Need("reward", {"reward": kept.reward}, {}, notes),
        _finetune(config, painter, kept, processes),
        _painting("evaluate", painter, config.evaluate, {"judge": kept.judge, "reward": kept.reward}, copies),
    ]


def _painting(stage: str, painter: Painter, settings: Any, more: dict[str, int], copies: int = 1) -> Need:
    """A stage that paints batch by batch, with so many generators on the device; `more` comes there after encoding."""
    phases = {"painting": painter.painting(settings.batch).bytes, "decoding": painter.decoding(settings.batch)}
    return _need(stage, painter, {"network": copies * painter.weights, **more}, phases, copies, sum(more.values()))


def _finetune(config: Any, painter: Painter, kept: _Kept, processes: int) -> Need:
    """The weights, those of the twin that rolls out, and what is trained: in float32, with a gradient, two moments of
    AdamW and an average."""
    settings = config.finetune
    asks = "judge" in settings.rewarded or settings.refresh or (settings.watch and settings.watch.judge)
    pictures = -(-settings.groups * settings.trained.group_size // processes)
    rows = min(settings.batch, pictures)
    whole = settings.lora is None
    held = {
        "network": 4 * painter.trained if whole else painter.weights,
        "twin": painter.weights if settings.twin else 0,
        "trained": (16 if whole else 20) * painter.trained,
        "judge": kept.judge if asks else 0,
        "reward": kept.reward if settings.rewarded & {"model", "checkpoint"} else 0,
    }
    if whole and settings.keep_base:
        held["base"] = painter.weights
    phases = {
        "painting": painter.painting(rows).bytes,
        "decoding": painter.decoding(rows),
        "learning": painter.learning(rows).bytes,
    }
    return _need("finetune", painter, held, phases)


def _need(
    stage: str, painter: Painter, held: dict[str, int], phases: dict[str, int], copies: int = 1, later: int = 0
) -> Need:
    """With text encoders and codec, which are held all the time or only while they are used; so much of what is held
    comes after prompts were encoded."""
    if painter.offloads:
        encoding = max(0, painter.encoders - later)
        phases = {**phases, "encoding": encoding, "decoding": painter.codec + phases["decoding"]}
    else:
        held = {**held, "encoders": copies * painter.encoders, "codec": copies * painter.codec}
    return Need(stage, {name: size for name, size in held.items() if size}, phases)


def _kept(config: Any, memory: int) -> _Kept:
    found = _Kept()
    try:
        found.judge = _judge(config.judge, memory)
    except Unknown as error:
        found.notes.append(f"judge: {error}")
    paths = [term.path for term in config.finetune.mixture.terms if term.type == "checkpoint"]
    for checkpoint in (config.reward.backbone.checkpoint, *paths):
        try:
            found.reward += _weights(checkpoint, getattr(config.reward.backbone, "dtype", "float32"))
        except Unknown as error:
            found.notes.append(f"reward: {error}")
    return found


def _judge(settings: Any, memory: int) -> int:
    """Bytes that a judge takes of this device."""
    if isinstance(settings, EnsembleJudge):
        return sum(_judge(member, memory) for member in settings.members)
    model = getattr(settings, "model", settings)
    if isinstance(model, ServerModel):
        return round(_share(model.serve.arguments) * memory) if model.serve else 0
    if model.type == "vllm":
        return round(model.engine.get("gpu_memory_utilization", _SERVED_SHARE) * memory)
    return _weights(model.checkpoint)


def _share(arguments: Sequence[str]) -> float:
    told = [argument.partition("=")[2] for argument in arguments if argument.startswith(f"{_ROOM}=")]
    return float(told[-1]) if told else _SERVED_SHARE


@functools.cache
def _weights(checkpoint: str, dtype: str | None = None) -> int:
    """Bytes of all networks at a checkpoint, in `dtype` or as they are kept."""
    parts = geometry(checkpoint).parts.values()
    return sum(metering.size(part.build(), getattr(torch, dtype or part.dtype or "float32")) for part in parts)


def device_memory(processes: int = 1) -> int:
    """Bytes of the device that this process would work on; processes on a CPU share its memory."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return psutil.virtual_memory().total // processes


@dataclass(frozen=True)
class Remedy:
    """Settings that bring a stage under the memory of a device, or as near as they can."""

    settings: tuple[str, ...]
    need: Need


def remedy(config: Any, stage: str, memory: int, processes: int) -> Remedy:
    """One after another those that make `stage` smaller, the ones that cost least first, until it fits."""

    def of(changed: Any) -> Need:
        return next(need for need in needs(changed, processes, memory) if need.stage == stage)

    found, chosen = of(config), {}
    for name, value, changed in _smaller(config, stage):
        if found.total <= memory:
            break
        tried = changed(config)
        if (need := of(tried)).total < found.total:
            config, found = tried, need
            chosen[name] = value
    return Remedy(tuple(f"{name}={value}" for name, value in chosen.items()), found)


def _smaller(config: Any, stage: str) -> Iterator[tuple[str, str, Any]]:
    """Settings to try: name, value, and what makes of a config one with it."""
    section = getattr(config, stage)

    def to(part: str, **values: Any) -> Any:
        return lambda config: config.model_copy(update={part: getattr(config, part).model_copy(update=values)})

    if stage not in ("sample", "finetune", "evaluate"):
        return
    yield "generator.offload", "true", to("generator", offload=True)
    if stage == "finetune":
        yield "finetune.gradient_checkpointing", "true", to("finetune", gradient_checkpointing=True)
        if section.updates == 1 and not section.compile:
            yield "finetune.twin", "false", to("finetune", twin=False)
    batch = section.batch // 2
    while batch:
        yield f"{stage}.batch", str(batch), to(stage, batch=batch)
        batch //= 2
    for name in ("text_dtype", "codec_dtype", "dtype"):
        yield f"generator.{name}", "bfloat16", to("generator", **{name: "bfloat16"})
    if stage == "finetune":
        yield "finetune.dtype", "bfloat16", to("finetune", dtype="bfloat16")
    yield "generator.guidance", "1", to("generator", guidance=1.0)


def check(config: Any, stage: str, processes: int = 1) -> None:
    """Raises UserError where `stage` needs more than this device has, as far as can be told."""
    memory = device_memory(processes)
    try:
        found = needs(config, processes, memory)
    except Unknown:
        return
    for need in found:
        if need.stage == stage and need.total > memory:
            raise UserError(told(config, need, memory, processes))


def told(config: Any, need: Need, memory: int, processes: int) -> str:
    """One line on a stage that does not fit."""
    line = f"memory: {need.stage} needs {_gib(need.total)} GiB a process at least, and there are {_gib(memory)}"
    best = remedy(config, need.stage, memory, processes)
    if best.need.total <= memory:
        return f"{line}; it takes {_gib(best.need.total)} with {' '.join(best.settings)}"
    judge = need.held.get("judge", 0)
    if judge and best.need.total - judge <= memory:
        return f"{line}; give the judge a device of its own (judge.model: a server at urls) {' '.join(best.settings)}"
    if not best.settings:
        return f"{line}; take a larger device or a smaller model"
    return f"{line}; even with {' '.join(best.settings)} it takes {_gib(best.need.total)}: take a larger device"


def print_needs(found: Sequence[Need], memory: int, console: Console) -> None:
    """Show a line for each stage: what it holds, the most of its phases, and how much of the device that is."""
    table = Table("stage", "held, GiB a process", "at once", "total", "of device")
    for column in table.columns[2:]:
        column.justify = "right"
    for need in found:
        held = ", ".join(f"{name} {_gib(size)}" for name, size in need.held.items())
        phase = max(need.phases, key=need.phases.__getitem__, default=None)
        most = f"{phase} {_gib(need.phases[phase])}" if phase else ""
        table.add_row(need.stage, held, most, _gib(need.total), f"{100 * need.total / memory:.0f} %")
    console.print(table)
    for note in dict.fromkeys(note for need in found for note in need.notes):
        console.print(f"not counted: {note}", markup=False, highlight=False, soft_wrap=True)


def call_seconds(config: Any, speed: float, learning: bool = False) -> float | None:
    """Of one network call for one picture, or of one with its backward pass, on a device of `speed` matmul operations a
    second; None where nothing tells what the generator looks like."""
    painter = Painter(config)
    try:
        cost = painter.learning(1) if learning else painter.painting(1)
    except Unknown:
        return None
    return cost.flops / (SHARE * speed)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}" if size >= GIB // 10 else f"{size / GIB:.2f}"
