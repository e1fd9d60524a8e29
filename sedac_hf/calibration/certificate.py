"""The certificate: a finite-sample statement on the perplexity increase of a policy."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sedac_hf import _core
from sedac_hf.calibration.bounds import RiskTarget, TestResult
from sedac_hf.calibration.pareto import Policy
from sedac_hf.errors import CertificateError, SedacError
from sedac_hf.files import write_atomically

if TYPE_CHECKING:
    from sedac_hf.core.cascade_controller import CascadeConfig

__all__ = ["CERTIFICATE_VERSION", "Certificate", "HeldOutCheck", "Rung"]

CERTIFICATE_VERSION = 1
# Written beside the record: the result in words, and the digest of the artefact it belongs to.
_DERIVED = ("statement", "tensors_sha256")


@dataclass(frozen=True)
class Rung:
    """One policy of the walk and its test on the certification documents.

    Attributes:
        policy: The policy.
        result: Its p-values.
        exit_share: Share of the decode steps that left early.
        mean_depth: Mean number of layers that a decode step ran.
    """

    policy: Policy
    result: TestResult
    exit_share: float
    mean_depth: float

    def to_dict(self) -> dict[str, Any]:
        """The rung as plain JSON values; an infinite mean becomes None."""
        values = asdict(self.result)
        values["mean"] = values["mean"] if math.isfinite(values["mean"]) else None
        return {
            "policy": self.policy.to_dict(),
            "result": values,
            "exit_share": self.exit_share,
            "mean_depth": self.mean_depth,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Rung:
        """Inverse of `to_dict`."""
        result = dict(values["result"])
        result["mean"] = math.inf if result["mean"] is None else result["mean"]
        return cls(
            Policy.from_dict(values["policy"]),
            TestResult(**result),
            float(values["exit_share"]),
            float(values["mean_depth"]),
        )


@dataclass(frozen=True)
class HeldOutCheck:
    """What the deployed policy did on documents that chose nothing.

    Attributes:
        documents: Number of documents.
        mean_delta: Mean rise of the NLL per token over documents, in nats; None when not finite.
        interval: 95 % bootstrap interval of the mean over documents; None when not finite.
        exit_share: Share of the decode steps that left early.
        holds: Whether the mean is within the limit.
    """

    documents: int
    mean_delta: float | None
    interval: tuple[float, float] | None
    exit_share: float
    holds: bool


@dataclass(frozen=True)
class Certificate:
    """What was tested, how, and what may be deployed.

    Attributes:
        target: Epsilon, delta, clip and allowed tail, fixed beforehand.
        walk: The policies tested, from the safest on; the walk stops at the first that fails.
        accepted: How many were shown safe; the last of them is deployed, none when 0.
        documents: Certification documents that were tested on.
        left_out: Certification documents left out: repeated, without a token that may exit, or
            without a finite NLL under the base itself.
        interval: 95 % bootstrap interval of the deployed policy's mean rise; None without one.
        tail_upper: Clopper-Pearson bound of the deployed policy's share beyond the clip at
            confidence `1 - delta`, for this policy alone; None without one.
        needed_documents: About how many documents in all would show the safest policy safe; None
            when a policy was accepted or no number would.
        splits: Hash of each split of documents.
        dtype: Data type that the model ran in.
        kv_mode: How K/V of exited tokens came about.
        fingerprint: Fingerprint of the base.
        held_out: Check of the deployed policy on further documents; None without one.
        versions: Versions of the software.
        version: Format of this record.
    """

    target: RiskTarget
    walk: tuple[Rung, ...]
    accepted: int
    documents: int
    left_out: int
    dtype: str
    kv_mode: str
    splits: dict[str, str]
    interval: tuple[float, float] | None = None
    tail_upper: float | None = None
    needed_documents: int | None = None
    fingerprint: dict[str, Any] | None = None
    held_out: HeldOutCheck | None = None
    versions: dict[str, str] = field(default_factory=dict)
    version: int = CERTIFICATE_VERSION

    def __post_init__(self) -> None:
        """Check that the record agrees with itself.

        Raises:
            CertificateError: If the number accepted does not follow from the p-values, or a value
                is out of range.
        """
        if self.version != CERTIFICATE_VERSION:
            raise CertificateError(
                f"the certificate has format {self.version!r}, this sedac_hf reads "
                f"{CERTIFICATE_VERSION}; upgrade sedac_hf, or certify again."
            )
        p_values = [rung.result.p_value for rung in self.walk]
        parts = [(r.result.p_betting, r.result.p_tail) for r in self.walk]
        if not all(0.0 <= p <= 1.0 for pair in parts for p in pair):
            raise CertificateError("the certificate has p-values outside [0, 1]; certify again.")
        follows = _core.fixed_sequence(np.array(p_values, dtype=np.float64), self.target.delta)
        if self.accepted != follows or len(self.walk) > follows + 1:
            raise CertificateError(
                f"the certificate says that {self.accepted} policies passed, but {follows} follow "
                f"from its {len(self.walk)} p-values; it was changed since. Certify again."
            )
        if self.documents < 0 or self.left_out < 0 or (self.walk and not self.documents):
            raise CertificateError(
                f"the certificate counts {self.documents} documents and {self.left_out} left out "
                f"for a walk of {len(self.walk)} policies; certify again."
            )

    @property
    def policy(self) -> Policy | None:
        """The policy to deploy: the last one shown safe, None when none was."""
        return self.walk[self.accepted - 1].policy if self.accepted else None

    def cost_of(self, rules: CascadeConfig) -> float | None:
        """What a step by these rules was expected to cost; a plain step costs 1.

        Args:
            rules: Rules by which tokens leave.

        Returns:
            None if no policy of the walk has them.
        """
        policies = (rung.policy for rung in self.walk)
        return next((policy.cost for policy in policies if policy.cascade == rules), None)

    @property
    def deployed(self) -> Rung | None:
        """The test of the policy to deploy."""
        return self.walk[self.accepted - 1] if self.accepted else None

    @property
    def ppl_increase(self) -> float | None:
        """Increase of the geometric mean perplexity seen on the certification documents."""
        rung = self.deployed
        return math.expm1(rung.result.mean) if rung else None

    def statement(self) -> str:
        """The result in words."""
        rung, target = self.deployed, self.target
        if rung is not None:
            return (
                f"With confidence {1 - target.delta:.0%}, perplexity on documents like these rises "
                f"by at most {target.epsilon:.1%} (mean over documents of the rise of the NLL per "
                f"token, clipped at {target.clip:g} nats), and at most {target.tail_share:.0%} of "
                f"documents rise by more than the clip. Shown on {self.documents} documents in "
                f"{self.dtype}, K/V by {self.kv_mode}; seen there: {self.ppl_increase:+.2%} with "
                f"{rung.exit_share:.1%} of the tokens leaving early."
            )
        if not self.walk:
            return (
                "No policy was found that saves anything within the target, so exits stay off in "
                "certified mode. Train the exit heads longer or add checkpoints."
            )
        start = (
            f"The safest policy was not shown to keep perplexity within {target.epsilon:.1%} on "
            f"{self.documents} documents, so exits stay off in certified mode."
        )
        if self.needed_documents is None:
            return start + (
                " More documents would not change that: what was seen speaks against the policy "
                "itself. Train the exit heads longer, or start the walk from a safer policy."
            )
        more = max(1, self.needed_documents - self.documents)
        return start + f" About {more} more documents would decide it."

    def check_covers(
        self, *, dtype: str, kv_mode: str, cascade: CascadeConfig | None = None
    ) -> None:
        """Refuse a use that the certificate says nothing about.

        Args:
            dtype: Data type of the model, such as `"bfloat16"`.
            kv_mode: How K/V of exited tokens come about.
            cascade: Thresholds in use; None skips their comparison.

        Raises:
            CertificateError: If no policy was certified or something differs from what was tested.
        """
        policy = self.policy
        if policy is None:
            raise CertificateError(self.statement())
        for name, want, found in (
            ("data type", self.dtype, dtype),
            ("K/V mode", self.kv_mode, kv_mode),
        ):
            if want != found:
                raise CertificateError(
                    f"the certificate was obtained with {name} {want!r}, the model runs with "
                    f"{found!r}. Load the model with {want!r}, or certify again with `sedac fit`."
                )
        if cascade is not None and cascade != policy.cascade:
            raise CertificateError(
                "the thresholds in use are not those that were certified; load them from the same "
                "artefact as the certificate, or certify again with `sedac fit`."
            )

    def to_dict(self) -> dict[str, Any]:
        """The certificate as plain JSON values, with its statement in words."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {
            "target": asdict(self.target),
            "walk": [rung.to_dict() for rung in self.walk],
            "held_out": asdict(self.held_out) if self.held_out else None,
            "statement": self.statement(),
        }
        return values

    def to_json(self) -> str:
        """The certificate as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Certificate:
        """Read and check what `to_dict` wrote.

        Args:
            values: The record.

        Returns:
            The certificate.

        Raises:
            CertificateError: If something is missing, unknown, malformed or does not agree.
        """
        version = values.get("version")
        if version != CERTIFICATE_VERSION:
            raise CertificateError(
                f"the certificate has format {version!r}, this sedac_hf reads "
                f"{CERTIFICATE_VERSION}; upgrade sedac_hf, or certify again."
            )
        try:
            rest = {k: v for k, v in values.items() if k not in _DERIVED}
            rest["target"] = RiskTarget(**rest["target"])
            rest["walk"] = tuple(Rung.from_dict(rung) for rung in rest["walk"])
            rest["interval"] = _pair(rest["interval"])
            if rest["held_out"] is not None:
                check = {**rest["held_out"], "interval": _pair(rest["held_out"]["interval"])}
                rest["held_out"] = HeldOutCheck(**check)
            return cls(**rest)
        except CertificateError:
            raise
        except (SedacError, KeyError, TypeError, ValueError) as error:
            raise CertificateError(
                f"the certificate is malformed ({type(error).__name__}: {error}); fetch the "
                "artefact again, or certify again."
            ) from error

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """Read and check JSON text.

        Args:
            text: What `to_json` wrote.

        Returns:
            The certificate.

        Raises:
            CertificateError: If it is not JSON or not a valid certificate.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise CertificateError(
                f"the certificate is not valid JSON ({error}); fetch the artefact again."
            ) from error
        if not isinstance(values, dict):
            raise CertificateError(
                f"the certificate must be a JSON object, found {type(values).__name__}."
            )
        return cls.from_dict(values)

    def save(self, path: str | Path) -> None:
        """Write the certificate to a file, whole or not at all.

        Args:
            path: The file.
        """
        write_atomically(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read and check a file.

        Args:
            path: The file.

        Returns:
            The certificate.

        Raises:
            CertificateError: If the file cannot be read or is not a valid certificate.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CertificateError(f"{path} cannot be read as a certificate: {error}") from error
        try:
            return cls.from_json(text)
        except CertificateError as error:
            raise CertificateError(f"{path}: {error}") from error


def _pair(values: Sequence[float] | None) -> tuple[float, float] | None:
    if values is None:
        return None
    low, high = values
    return float(low), float(high)
