"""What a video says of how it was made, read as if anybody might have written it."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ..data.video import VideoError
from ..memory.plan import Plan, PlanError
from ..models.loading import FILES, SourceFile
from ..models.lora import fuse_lora, load_lora
from ..models.tiling import TilingError
from ..numerics import NumericsError, read_numerics
from ..settings import Settings, SettingsError, read_configs
from ..speed import Speed
from ._arguments import DType

if TYPE_CHECKING:
    from ..inputs import Inputs
    from ..models import ExpertTransformer

SINCE = ("strength", "ofs", "longer")  # settings that older videos do not carry; those were made without
PARTS = ("transformer", "vae")
CARRIED = ("transformer_file", "vae_file", "loras")  # older videos give these as reasons, but carry what it takes


def recorded_settings(file: Path, made: dict, model: str | None) -> Settings:
    """The settings that a video carries, complete. Raises VideoError for a video that cannot be made again."""
    reasons = made.get("not_replayable_because_of") or []
    reasons = [str(reason) for reason in (reasons if isinstance(reasons, list) else [reasons])]
    if lost := ", ".join(reason for reason in reasons if reason not in CARRIED):
        raise VideoError(f"{file} cannot be replayed: it was made with given {lost}, which it does not carry")
    names = [f.name for f in fields(Settings) if f.name not in SINCE]
    missing = [n for n in (*names, "model", "dtype", "numerics", "model_sha256", "environment") if n not in made]
    if missing:
        raise VideoError(f"{file} cannot be replayed: its metadata does not say {', '.join(missing)}")
    kinds = {"model": str, "model_sha256": str, "environment": dict, "seed": int}
    wrong = [name for name, kind in kinds.items() if not isinstance(made[name], kind)]
    wrong += [name for name in ("dtype", "vae_dtype") if made.get(name, made["dtype"]) not in get_args(DType)]
    if wrong:
        raise wrong_value(file, wrong[0], made.get(wrong[0]))
    try:
        numerics = read_numerics(made["numerics"])
    except NumericsError as error:
        raise VideoError(f"{file} cannot be replayed: in its metadata {error}") from error
    try:
        settings = Settings(**{name: made[name] for name in (*names, *SINCE) if name in made})
        return settings.resolve(read_configs(model or made["model"]), numerics)
    except SettingsError as error:
        raise VideoError(f"{file} cannot be replayed with this model: {error}") from error


def recorded_pieces(file: Path, made: dict) -> dict[str, int] | None:
    """How an extended video was made, None for one that was not. Raises VideoError for metadata that do not say it."""
    pieces, inputs = made.get("continued"), made.get("inputs_sha256", {})
    if pieces is None:
        return None
    if not isinstance(pieces, dict) or set(pieces) != {"num_pieces", "overlap"} or "video" not in inputs:
        raise wrong_value(file, "continued", pieces)
    return pieces


def recorded_plan(file: Path, made: dict) -> Plan | None:
    """The plan that a video was made under, where it may have changed it. Raises VideoError for what is no plan."""
    if made.get("plan") is None:
        return None
    try:
        return Plan.read(made["plan"])
    except (PlanError, TilingError) as error:
        raise VideoError(f"{file} cannot be replayed: in its metadata {error}") from error


def recorded_speed(file: Path, made: dict) -> Speed:
    """What was given up for time. Raises VideoError for what is no such thing."""
    try:
        return Speed.read(made.get("speed", {}))
    except SettingsError as error:
        raise VideoError(f"{file} cannot be replayed: in its metadata {error}") from error


def check_inputs(file: Path, made: dict, files: dict[str, Path | None], inputs: "Inputs") -> None:
    """Raises VideoError unless exactly the inputs are given, by their values, that a video was made from."""
    then, now = made.get("inputs_sha256", {}), inputs.hashes
    if not isinstance(then, dict):
        raise wrong_value(file, "inputs_sha256", then)
    for name in {**then, **now}:
        option = "--" + name.replace("_", "-")[:60]
        if name not in now:
            raise VideoError(f"{file} was made from {name[:60]}; give it with {option}")
        if name not in then:
            raise VideoError(f"{file} was made without {name}; leave {option} out")
        if then[name] != now[name]:
            what = "values" if name == "latents" else "pixels"
            raise VideoError(f"{name} is {files[name]}, whose {what} are not those that {file} was made from")


@dataclass(frozen=True)
class Beside:
    """The files that a video was made with beside the model's folder, where they are now."""

    parts: dict[str, SourceFile]  # in the place of the folder's transformer and VAE
    loras: list[tuple[SourceFile, dict[str, Any]]]  # with what it takes to load each again

    @classmethod
    def found(cls, file: Path, made: dict, given: dict[str, Path | None], loras: tuple[Path, ...]) -> "Beside":
        """From flags, or where they were. Raises VideoError that names one that is missing, another, or too many."""
        parts, known = {}, [SourceFile(path) for path in loras if regular(path, "lora")]
        for part in PARTS:
            record, path = made.get(f"{part}_file"), given[part]
            if record is None and path is not None:
                raise VideoError(f"{file} was made without a file for the {part}; leave --{part} out")
            if record is not None:
                check_record(file, f"{part}_file", record)
                source = [] if path is None or not regular(path, part) else [SourceFile(path)]
                parts[part] = located(file, f"the {part}", f"--{part}", record, source)
        records = made.get("loras", [])
        if not isinstance(records, list):
            raise wrong_value(file, "loras", records)
        for record in records:
            check_record(file, "loras", record)
        hashes = {record["sha256"] for record in records}
        for source in known:
            if source.sha256 not in hashes:
                raise VideoError(f"lora is {source.path}, which is none of the LoRAs that {file} was made with")
        moved = {source.sha256: [source] for source in known}
        return cls(parts, [
            (located(file, "a LoRA", "--lora", record, moved.get(record["sha256"], [])), record) for record in records
        ])  # fmt: skip

    def load_loras(self, file: Path, transformer: "ExpertTransformer") -> None:
        """Raises VideoError for metadata that no LoRA was loaded with."""
        for source, record in self.loras:
            weight, name, alpha = (record.get(word) for word in ("weight", "name", "alpha"))
            if not isinstance(name, str):
                raise wrong_value(file, "loras", record)
            try:
                load_lora(transformer, source.path, weight, name, alpha)
            except ValueError as error:
                raise VideoError(f"{file} cannot be replayed: its LoRA {source.path}: {error}") from error
        if any(record.get("fused") for _, record in self.loras):
            fuse_lora(transformer)


def located(file: Path, what: str, flag: str, record: dict, given: Iterable[SourceFile]) -> SourceFile:
    """The file of a record: the one that is given, or the one where it was."""
    for source in given:
        if source.sha256 != record["sha256"]:
            raise VideoError(f"{flag[2:]} is {source.path}, which is not the file that {file} was made with")
        return source
    was = SourceFile(Path(record["file"]))
    # Nothing but what may hold weights is opened because a video says so.
    if was.path.suffix not in FILES or not was.path.is_file():
        raise VideoError(f"{file} was made with {what} {str(was.path)[:300]}, which is not there; give it with {flag}")
    if was.sha256 != record["sha256"]:
        raise VideoError(f"{was.path} is not {what} any more that {file} was made with; give that with {flag}")
    return was


def check_record(file: Path, name: str, record: object) -> None:
    words = [record.get(word) for word in ("file", "sha256")] if isinstance(record, dict) else [None]
    if not all(isinstance(word, str) and "\0" not in word for word in words):
        raise wrong_value(file, name, record)


def regular(path: Path, name: str) -> bool:
    if not path.is_file():
        raise VideoError(f"{name} is {path}, which is no file")
    return True


def wrong_value(file: Path, name: str, value: object) -> VideoError:
    return VideoError(f"{file} cannot be replayed: in its metadata {name} is {str(value)[:60]!r}")
