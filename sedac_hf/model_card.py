"""The card of an artefact: metadata for the Hub and a README, written at every save.

What a card says beyond the artefact itself comes from a report, a mapping of plain JSON values: the
keys that `sedac_hf.evaluation.report.build_report` writes, and under `"fit"` those of `FitReport`
(`seconds`, `tokens`, `documents`, `self_written`, and tables `heads`, `gates`, `storage`), with
`command` and `texts` where they are known. Everything in it is optional.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

__all__ = ["CardSource", "model_card"]

_TEMPLATE = Path(__file__).with_name("model_card_template.md")
_COLUMNS = {
    "layer_idx": "after layer",
    "feedback": "deep feedback",
    "seconds": "time",
    "stand_in_agreement": "agreement, own output as feedback",
    "top": "among the first",
    "share": "share that may leave",
}
_OWN_TEXTS = "texts that the base wrote itself"


@dataclass(frozen=True)
class CardSource:
    """All that a card is made of.

    Attributes:
        name: What to pass to `from_pretrained`: a Hub name or a path.
        config: Fields of `SedacConfig`, `text_config` as a mapping.
        size: Size of sedac.safetensors in bytes.
        certificate: Content of certificate.json, or None.
        certified: Whether a policy was certified, so that exits act in certified mode.
        results: Report of evaluation and fit, see the module's description.
        chat: Whether the tokenizer has a chat template.
        base_model: Hub name of the base, or None when it has none.
        base_note: How the base is found, a sentence or nothing.
        versions: Package -> version.
        metadata: Further fields for the card's metadata (`license`, `language`, ...).
    """

    name: str
    config: Mapping[str, Any]
    size: int
    certificate: Mapping[str, Any] | None = None
    certified: bool = False
    results: Mapping[str, Any] = field(default_factory=dict)
    chat: bool = False
    base_model: str | None = None
    base_note: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


def model_card(source: CardSource) -> ModelCard:
    """Write the card.

    Args:
        source: What it is made of.

    Returns:
        The card, metadata and text; `.save(path)` writes it.
    """
    config, results = source.config, source.results
    certificate = source.certificate
    fit = results.get("fit") or {}
    base = source.base_model or config.get("base_model_name_or_path") or "its base model"
    link = f"[{base}](https://huggingface.co/{base})" if source.base_model else f"`{base}`"
    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        autoescape=False,
    )
    text = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        card_data=card_data(source).to_yaml(),
        name=source.name,
        base_label=str(base).rsplit("/", maxsplit=1)[-1],
        base_link=link,
        base_note=source.base_note,
        size=_size(source.size),
        summary=_summary(source),
        checkpoints=[_checkpoint(point) for point in config.get("checkpoints") or []],
        depth=(config.get("text_config") or {}).get("num_hidden_layers", "?"),
        chat=source.chat,
        mode=config.get("mode"),
        certificate=certificate,
        certified=source.certified,
        target=(certificate or {}).get("target"),
        seen=_seen(certificate) if source.certified else None,
        held_out=_held_out(certificate),
        measured=_measured(results),
        conditions=_conditions(results),
        scope=_scope(source),
        fit=_fit_lines(fit),
        tables=_tables(fit),
        probe_target=config.get("probe_target"),
        probe_rank=config.get("probe_rank"),
        versions=sorted(source.versions.items()),
        format_version=config.get("sedac_format_version"),
        fingerprint=_short_fingerprint(config.get("fingerprint")),
    )
    return ModelCard(text)


def card_data(source: CardSource) -> ModelCardData:
    """Write the metadata block: library, task, base, tags, and measured values as a model index."""
    tags = ["sedac", "early-exit", "adaptive-computation"]
    fields: dict[str, Any] = {"library_name": "sedac_hf", "pipeline_tag": "text-generation"}
    if source.base_model:
        tags.append(f"base_model:adapter:{source.base_model}")
        fields |= {"base_model": source.base_model, "base_model_relation": "adapter"}
    evaluations = _evaluations(source)
    if evaluations:
        fields |= {"model_name": source.name.rsplit("/", maxsplit=1)[-1]}
    extra = dict(source.metadata)
    tags += [tag for tag in extra.pop("tags", []) if tag not in tags]
    return ModelCardData(**fields, tags=tags, eval_results=evaluations or None, **extra)


def _evaluations(source: CardSource) -> list[EvalResult]:
    metrics = (
        ("base_ppl", "perplexity", "Perplexity of the base"),
        ("sedac_ppl", "perplexity", "Perplexity with exits"),
        ("ppl_increase", "perplexity_increase", "Relative increase of perplexity"),
        ("exit_share", "exit_share", "Share of tokens that leave early"),
        ("mean_depth", "mean_depth", "Mean number of layers per token"),
        ("speed_vs_generate", "speedup", "Tokens per second against generate() of the base"),
        ("speed_vs_plain", "speedup", "Tokens per second against the same loop without exits"),
    )
    found = [(key, kind, label) for key, kind, label in metrics if _number(source.results, key)]
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type="sedac-held-out",
            dataset_name=f"Held-out documents ({_texts(source.results)})",
            metric_type=kind,
            metric_name=label,
            metric_value=round(float(source.results[key]), 5),
        )
        for key, kind, label in found
    ]


def _number(results: Mapping[str, Any], key: str) -> bool:
    return isinstance(results.get(key), (int, float))


def _texts(results: Mapping[str, Any]) -> str:
    """What the documents were."""
    fit = results.get("fit") or {}
    given = "given texts" if fit.get("self_written") is False else _OWN_TEXTS
    return str(fit.get("texts") or given)


def _checkpoint(point: Mapping[str, Any]) -> dict[str, Any]:
    layers = point.get("num_layers", 1)
    block = f"{layers} decoder layer{'s' if layers > 1 else ''}"
    is_block = point.get("head", "block") == "block"
    stored = f"rank-{point['delta_rank']} delta" if point.get("delta_rank") else "whole"
    return {
        "layer_idx": point["layer_idx"],
        "kind": block if is_block else f"lens of rank {point.get('lens_rank')}",
        "feedback": bool(point.get("feedback")),
        "stored": stored,
    }


def _measured(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []

    def add(key: str, label: str, pattern: str, scale: float = 1.0) -> None:
        if _number(results, key):
            rows.append((label, pattern.format(scale * results[key])))

    add("base_ppl", "perplexity of the base", "{:.3f}")
    add("sedac_ppl", "perplexity with exits", "{:.3f}")
    add("ppl_increase", "increase", "{:+.2f} %", 100)
    interval = results.get("ppl_increase_ci95")
    if interval and all(isinstance(end, (int, float)) for end in interval):
        low, high = (100 * float(end) for end in interval)
        rows.append(("95 % interval over documents", f"{low:+.2f} % to {high:+.2f} %"))
    add("exit_share", "tokens that leave early", "{:.1f} %", 100)
    for layer, count in sorted((results.get("exits_by_layer") or {}).items(), key=_layer_order):
        rows.append((f"exits after layer {layer}", str(count)))
    if _number(results, "mean_depth"):
        depth = f" of {results['depth']}" if _number(results, "depth") else ""
        rows.append(("mean depth", f"{results['mean_depth']:.2f}{depth} layers"))
    add("speed_vs_generate", "speed against `generate()` of the base", "{:.2f}x")
    add("speed_vs_plain", "speed against our loop without exits", "{:.2f}x")
    add("head_share", "share of the output matrix in a full pass", "{:.1f} %", 100)
    return rows


def _layer_order(item: tuple[Any, Any]) -> int:
    return int(item[0])


def _conditions(results: Mapping[str, Any]) -> str:
    """Say in a sentence what the numbers were measured on."""
    parts: list[str] = []
    if _number(results, "documents"):
        tokens = f", {results['tokens']:,} tokens" if _number(results, "tokens") else ""
        parts.append(f"Perplexity on {results['documents']} held-out documents{tokens}")
    speed = results.get("speed") or {}
    if speed:
        prompts = speed.get("prompt_lengths") or []
        parts.append(
            f"speed at batch 1, greedy, {len(prompts)} prompts, {speed.get('max_new_tokens')} new "
            "tokens each"
        )
    dtype = (results.get("config") or {}).get("dtype")
    machine = results.get("machine") or {}
    where = ", ".join(
        str(part)
        for part in (
            dtype,
            machine.get("accelerator") or machine.get("processor"),
            f"{machine['threads']} threads" if machine.get("threads") else None,
        )
        if part
    )
    if not parts:
        return ""
    return "; ".join(parts) + (f" ({where})." if where else ".")


def _summary(source: CardSource) -> str:
    count = len(source.config.get("checkpoints") or [])
    each = "checkpoint" if count == 1 else "checkpoints, each"
    parts = f"{count} {each} with a risk probe and an exit head"
    rules = ", the thresholds of the cascade, and the certificate" if source.certificate else ""
    return parts + (rules or ", and the thresholds of the cascade")


def _scope(source: CardSource) -> str:
    if not source.results:
        return "No record says on which texts these exits were fitted; measure them on your own."
    texts = _texts(source.results)
    verb = "Certified and measured" if source.certified else "Fitted and measured"
    return f"{verb} on {texts}. On text of another kind the same thresholds may cost more or less."


def _fit_lines(fit: Mapping[str, Any]) -> list[tuple[str, str]]:
    if not fit:
        return []
    lines: list[tuple[str, str]] = []
    if fit.get("command"):
        lines.append(("command", f"`{fit['command']}`"))
    if fit.get("seconds"):
        lines.append(("time", _with_parts(fit["seconds"], _duration)))
    if fit.get("tokens"):
        lines.append(("tokens", f"{fit['tokens']:,}"))
    written = fit.get("written_tokens") or 0
    if fit.get("train_tokens"):
        other = fit["tokens"] - written if written else 0
        given = f", {other:,} of them of further texts used for nothing else" if other else ""
        lines.append(("tokens for heads", f"{fit['train_tokens']:,}{given}"))
    if fit.get("documents"):
        lines.append(("documents", _with_parts(fit["documents"], "{:,}".format)))
    lines.append(("texts", _texts({"fit": fit})))
    return lines


def _with_parts(value: Any, write: Callable[[Any], str]) -> str:
    """A number, or the sum of several with each of them behind it."""
    if not isinstance(value, Mapping):
        return write(value)
    parts = ", ".join(f"{name} {write(part)}" for name, part in value.items())
    return f"{write(sum(value.values()))} ({parts})"


def _tables(fit: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tables of the fit's report: exit heads, gates, storage."""
    titles = {
        "heads": "Exit heads; agreement with the full model's first choice on held-out text",
        "gates": "Gates; AUROC of telling exits that disagree from those that agree",
        "modalities": "Evidence for the gates: what it lets leave beside the rest, and its price",
        "ablation": "Variants of the gates: cost of a step within the budget on other documents; "
        "what does not pay is stored and off",
        "storage": "Storage of the heads",
    }
    rows = {name: fit[name] for name in titles if fit.get(name)}
    if "ablation" in rows:
        short = ("name", "judged_cost", "chosen")
        rows["ablation"] = [{key: row.get(key) for key in short} for row in rows["ablation"]]
    return [{"title": titles[name], **_table(rows[name])} for name in titles if name in rows]


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return {
        "columns": [_COLUMNS.get(column, column.replace("_", " ")) for column in columns],
        "rows": [[_cell(column, row.get(column)) for column in columns] for row in rows],
    }


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{_cell('', part)} ({name})" for name, part in value.items())
    if column == "seconds":
        return _duration(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _seen(certificate: Mapping[str, Any] | None) -> float | None:
    """Rise of perplexity under the deployed policy on the certification documents."""
    if not certificate or not certificate.get("accepted"):
        return None
    mean = certificate["walk"][certificate["accepted"] - 1]["result"]["mean"]
    return None if mean is None else math.expm1(mean)


def _held_out(certificate: Mapping[str, Any] | None) -> str:
    check = (certificate or {}).get("held_out")
    if not check or check.get("mean_delta") is None:
        return "not finite"
    text = f"{100 * math.expm1(check['mean_delta']):+.2f} %"
    if check.get("interval"):
        low, high = (100 * math.expm1(end) for end in check["interval"])
        text += f" (95 % interval {low:+.2f} % to {high:+.2f} %)"
    return text


def _short_fingerprint(fingerprint: Mapping[str, Any] | None) -> str:
    weights = (fingerprint or {}).get("weights") or {}
    parts = [f"{part}:{value[:12]}" for part, value in sorted(weights.items()) if value]
    return " ".join(parts) or "none"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes = rest // 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{rest} s"
