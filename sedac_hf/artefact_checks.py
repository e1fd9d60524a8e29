"""Whether an artefact belongs to a base, and how far its certificate reaches."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from sedac_hf.artefact_format import CERTIFICATE_FILE, CONFIG_FILE, ArtefactFiles
from sedac_hf.calibration.certificate import Certificate
from sedac_hf.core.cascade_controller import CascadeConfig
from sedac_hf.errors import ArtefactError, CertificateError, FingerprintError
from sedac_hf.fingerprint import FingerprintMatch, compare, dtype_label

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_base", "read_certificate", "why_exits_stay_off"]

logger = logging.getLogger(__name__)


def read_certificate(files: ArtefactFiles) -> Certificate | None:
    """The certificate of an artefact, checked, or None if it has none.

    Raises:
        CertificateError: If it is malformed or does not agree with itself.
        ArtefactError: If it was issued for another base than the artefact's.
    """
    if files.certificate is None:
        return None
    path = files.directory / CERTIFICATE_FILE
    try:
        certificate = Certificate.from_dict(files.certificate)
    except CertificateError as error:
        raise CertificateError(f"{path}: {error}") from error
    expected, found = certificate.fingerprint, files.config.get("fingerprint")
    if expected is not None and not compare(expected, found or {}).same_weights:
        raise ArtefactError(f"{path} was issued for another base than {CONFIG_FILE} describes.")
    return certificate


def check_base(files: ArtefactFiles, match: FingerprintMatch, mode: str) -> str | None:
    """Refuse a base that the artefact was not made for.

    Args:
        files: The artefact.
        match: How the base compares with the one that the artefact was made for.
        mode: Mode that the model is to run in.

    Returns:
        Why certified mode is refused, None if it is not.

    Raises:
        FingerprintError: If the shape differs, or the weights in certified mode.
    """
    if not match.same_shape:
        differences = "; ".join(
            f"{name}: expected {want}, found {have}"
            for name, (want, have) in match.shape_differences.items()
        )
        raise FingerprintError(
            f"The artefact {files.source} was made for another base: {differences}. Give the base "
            f"it was fitted on ({files.config.get('base_model_name_or_path')}) as base_model."
        )
    if match.same_weights:
        return None
    parts = ", ".join(match.weight_differences or match.not_compared)
    reason = (
        f"the base has the shape that the artefact {files.source} was made for, but other weights "
        f"(in: {parts}), and its certificate says nothing about them."
    )
    if mode == "certified":
        raise FingerprintError(
            f"Certified mode is refused: {reason} Load it with mode='exact', which cannot change "
            "the output, give the base it was fitted on as base_model, or fit exits for this one "
            "with `sedac fit`."
        )
    logger.warning("Loaded with mode %r although %s Certified mode is refused.", mode, reason)
    return reason


def why_exits_stay_off(
    base: PreTrainedModel,
    cascade: CascadeConfig | None,
    kv_mode: str,
    certificate: Certificate | None,
) -> tuple[str | None, CascadeConfig | None]:
    """Whether the certificate reaches this use.

    Args:
        base: The loaded base.
        cascade: Rules as they were stored.
        kv_mode: How K/V of exited tokens come about.
        certificate: The certificate.

    Returns:
        Why it does not reach this use (None if it does), and the rules to run with.
    """
    if certificate is None:
        return "no certificate comes with the artefact. Make one with `sedac fit`.", cascade
    policy = certificate.policy
    if policy is not None and cascade is not None:
        # Stored thresholds are rounded to the float32 in which decisions are made.
        layers = list(cascade.layer_indices)
        rounded = CascadeConfig.from_tensors(
            policy.cascade.to_tensors(), layers, strategy=policy.cascade.strategy
        )
        if rounded == cascade and policy.cascade.layer_indices == cascade.layer_indices:
            cascade = policy.cascade
    try:
        certificate.check_covers(dtype=dtype_label(base), kv_mode=kv_mode, cascade=cascade)
    except CertificateError as error:
        return str(error), cascade
    return None, cascade
