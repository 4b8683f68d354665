"""All certificates of one run with everything needed to check, compare and repeat them."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np

from hf_certify.certificate import Certificate
from hf_certify.config import CertifyConfig, IntervalName, MarginOption
from hf_certify.errors import ReportFolderError, VerificationError
from hf_certify.radius import format_down, format_failure
from hf_certify.storage import RUN_INFO_FILE, encode_report, prepare_folder, read_report, replace_file, write_report

# raise it whenever the meaning of a stored key changes
REPORT_SCHEMA = 3

DEFAULT_RADII = (0.0, 0.25, 0.5, 0.75, 1.0)

_SETTINGS_OF_EACH = ("n0", "n", "sigma", "alpha", "interval")

_KEYS = frozenset({"schema", "config", "facts", "derived_from", "count", "certificates"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class CertificationReport:
    """The certificates of one run. ``M`` of them hold together except with probability at most ``alpha * M``.

    Attributes:
        certificates: One for each input, in the order of the inputs.
        config: Settings of the run, with the seed and the batch size that were used.
        facts: What was certified, where and with which versions: plain values.
        derived_from: The rule that the run was made with, if these bounds are a second look at its votes, else
            ``None``.
        run_info: How long the run took; saved in a file of its own, and no part of the report.
    """

    certificates: tuple[Certificate, ...]
    config: CertifyConfig
    facts: dict[str, Any]
    derived_from: IntervalName | None = None
    run_info: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def seed(self) -> int | None:
        """Root of all noise, in ``[0, 2**128)``; always known in a report of ``certify_pipeline``."""
        return self.config.seed

    @property
    def outputs(self) -> int | None:
        """Number of answers to an input, ``None`` if there is one that no number names."""
        last = self.certificates[-1].output if self.certificates else None
        return None if last is None else last + 1

    @property
    def abstentions(self) -> int:
        """Number of inputs about which nothing is claimed."""
        return sum(certificate.abstained for certificate in self.certificates)

    @property
    def draws_per_input(self) -> int:
        """Votes counted for every input: ``n0 + n``."""
        return self.config.n0 + self.config.n

    def certified_accuracy(self, labels: Sequence[int], radii: Sequence[float] = DEFAULT_RADII) -> tuple[float, ...]:
        """Return the share of inputs certified at their true label with at least each radius.

        Args:
            labels: True class of each input, in the order of the inputs.
            radii: l2, ``>= 0``, in the units of the noise.

        Returns:
            A share in ``[0, 1]`` for each radius.

        Raises:
            ValueError: If there is not one class index for each certificate.

        Example:
            >>> certificates = (Certificate.from_counts([9, 1], [990, 10], sigma=0.5),)
            >>> report = CertificationReport(certificates=certificates, config=CertifyConfig(sigma=0.5), facts={})
            >>> report.certified_accuracy([0], radii=[0, 0.5, 1])
            (1.0, 1.0, 0.0)
        """
        return self._shares(self._correct(labels), radii)

    def average_certified_radius(self, labels: Sequence[int]) -> float:
        """Return the mean radius over all inputs, 0 for a wrong class or an abstention (ACR).

        Args:
            labels: True class of each input, in the order of the inputs.

        Returns:
            l2, ``>= 0``, in the units of the noise.

        Raises:
            ValueError: If there is not one class index for each certificate.
        """
        return sum(c.radius for c in self._correct(labels)) / len(self.certificates)

    def with_interval(self, interval: IntervalName, margin: MarginOption = "auto") -> Self:
        """Return the report that the same votes give under another rule, for comparison tables. No model is run.

        Every certificate of either report is wrong with probability at most ``alpha``. The larger of the two radii is
        not covered: the rule to rely on must have been chosen before the draws. The result says what it derives from,
        unless it is this report itself, because the rule is the same.

        Example:
            >>> certificates = (Certificate.from_counts([9, 1, 0], [70, 29, 1], sigma=0.5, interval="cohen"),)
            >>> config = CertifyConfig(sigma=0.5, interval="cohen")
            >>> report = CertificationReport(certificates=certificates, config=config, facts={})
            >>> report.with_interval("max_upper").derived_from
            'cohen'
        """
        config = dataclasses.replace(self.config, interval=interval, margin=margin)
        if (config.interval, config.resolved_margin) == (self.config.interval, self.config.resolved_margin):
            return self
        return dataclasses.replace(
            self,
            certificates=tuple(certificate.with_interval(interval, margin) for certificate in self.certificates),
            config=config,
            derived_from=self.derived_from or self.config.interval,
        )

    def verify(self) -> None:
        """Recompute every claim from the votes it carries, without the model.

        Raises:
            VerificationError: If a certificate does not follow from its votes, or was made with other settings than
                the report declares.
        """
        if not self.certificates:
            raise VerificationError("A report must hold at least one certificate, got none.")
        outputs = self.outputs
        for position, certificate in enumerate(self.certificates):
            certificate.verify()
            if len(certificate.estimation) != (classes := len(self.certificates[0].estimation)):
                raise VerificationError(
                    f"Certificate {position} must have as many classes as the first, {classes}, got "
                    f"{len(certificate.estimation)}."
                )
            place = (position, None) if outputs is None else divmod(position, outputs)
            if (certificate.index, certificate.output) != place:
                raise VerificationError(
                    f"Certificate {position} must be about input and answer {place}, got "
                    f"{(certificate.index, certificate.output)}."
                )
            for name in _SETTINGS_OF_EACH:
                own, declared = getattr(certificate, name), getattr(self.config, name)
                if own != declared:
                    raise VerificationError(
                        f"Certificate {position} must have the settings of its report: {name} is {own!r} in the one, "
                        f"{declared!r} in the other."
                    )
            if certificate.margin != self.config.resolved_margin:
                raise VerificationError(f"Certificate {position} must have margin {self.config.resolved_margin!r}.")

    def summary(self, labels: Sequence[int] | None = None, radii: Sequence[float] = DEFAULT_RADII) -> str:
        """Return a few lines of text; every share and radius in it is cut off, never rounded up.

        Args:
            labels: True class of each input; without them shares count the certified inputs whatever their class.
            radii: l2, ``>= 0``, in the units of the noise.

        Raises:
            ValueError: If there is not one class index for each certificate.
        """
        total, config = len(self.certificates), self.config
        counted = [c for c in self.certificates if not c.abstained] if labels is None else self._correct(labels)
        shares = [
            f"{radius:g}: {format_down(share)}"
            for radius, share in zip(radii, self._shares(counted, radii), strict=True)
        ]
        lines = [
            f"{total} inputs, sigma {config.sigma}, interval {config.interval}, margin {config.resolved_margin}, "
            f"{self.draws_per_input} draws per input",
            f"certified {'share' if labels is None else 'accuracy'} at l2 radius  " + "  ".join(shares),
            f"average certified radius {format_down(sum(c.radius for c in counted) / total)}, "
            f"abstentions {self.abstentions}",
            f"each certificate is wrong with probability at most {config.alpha}, any of the {total} with at most "
            f"{format_failure(config.alpha, total)}; they hold for the smoothed classifier",
        ]
        if self.derived_from is not None:
            lines.append(
                f"bounds computed from the votes of a {self.derived_from} run, for comparison only: the larger of two "
                f"radii is not certified"
            )
        return "\n".join(lines)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the report as canonical JSON and return the path of the file; complete or not at all.

        Args:
            folder: Created if needed.
            overwrite: Whether the folder may hold files already; a report in it is replaced.

        Raises:
            ReportFolderError: If the folder holds something and ``overwrite`` is false, it cannot be written to, or
                ``facts`` hold something that JSON does not know.
        """
        path = write_report(prepare_folder(folder, overwrite=overwrite), self.to_dict())
        if self.run_info:
            replace_file(path.parent / RUN_INFO_FILE, encode_report(self.run_info))
        return path

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, ready for JSON."""
        return {
            "schema": REPORT_SCHEMA,
            "config": self.config.to_dict(),
            "facts": self.facts,
            "derived_from": self.derived_from,
            "count": len(self.certificates),
            "certificates": [certificate.to_dict() for certificate in self.certificates],
        }

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Return the report stored in ``folder``, not yet verified.

        Raises:
            ReportFolderError: If there is no report, or it is not one that this version understands.
        """
        values = read_report(folder, REPORT_SCHEMA)
        try:
            _check_parts(values)
            loaded = cls(
                certificates=tuple(Certificate.from_dict(item) for item in values["certificates"]),
                config=CertifyConfig.from_dict(values["config"]),
                facts=values["facts"],
                derived_from=values["derived_from"],
            )
            for classes in {len(certificate.estimation) for certificate in loaded.certificates}:
                check_labels(loaded.facts, classes)
            return loaded
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ReportFolderError(f"The report in {str(folder)!r} is damaged: {error!r}.") from error

    def _correct(self, labels: Sequence[int]) -> list[Certificate]:
        """Return the certificates whose class is the true one."""
        if len(labels) != len(self.certificates):
            raise ValueError(
                f"labels must hold one class for each of {len(self.certificates)} inputs, got {len(labels)}."
            )
        for position, (certificate, label) in enumerate(zip(self.certificates, labels, strict=True)):
            classes = len(certificate.estimation)
            # another kind of label would never match, and count as a wrong answer without a sign
            if isinstance(label, bool) or not isinstance(label, int | np.integer) or not 0 <= label < classes:
                raise ValueError(
                    f"labels must be class indices in [0, {classes}), got {label!r} for input {position}: use "
                    f"model.config.label2id to turn names into indices."
                )
        pairs = zip(self.certificates, labels, strict=True)
        return [c for c, label in pairs if not c.abstained and c.label == label]

    def _shares(self, counted: Sequence[Certificate], radii: Sequence[float]) -> tuple[float, ...]:
        """Return, of all inputs, the share that is among ``counted`` with at least each radius."""
        return tuple(sum(c.radius >= radius for c in counted) / len(self.certificates) for radius in radii)


def check_labels(facts: dict[str, Any], num_classes: int) -> None:
    """Raise unless the names of the classes, where ``facts`` holds them, are one for each class.

    Raises:
        ValueError: If ``facts["labels"]`` is no dict with a text for each of ``"0"`` to ``str(num_classes - 1)``.
    """
    names = facts.get("labels")
    if "labels" not in facts:
        return
    known = {str(index) for index in range(num_classes)}
    if not isinstance(names, dict) or names.keys() != known or not all(isinstance(v, str) for v in names.values()):
        raise ValueError(f"labels must hold one name for each of {num_classes} classes, got {names!r}.")


def _check_parts(values: dict[str, Any]) -> None:
    """Raise ``ValueError`` unless a stored report has exactly the known keys with values of the right kind."""
    if values.keys() != _KEYS:
        raise ValueError(f"A report must hold the keys {sorted(_KEYS)}, got {sorted(values)!r}.")
    settings = {field.name for field in dataclasses.fields(CertifyConfig)}
    # a setting that is left out would be replaced by today's default
    if not isinstance(values["config"], dict) or not settings <= values["config"].keys():
        raise ValueError(f"config must hold the keys {sorted(settings)}, got {values['config']!r}.")
    if not isinstance(values["facts"], dict):
        raise ValueError(f"facts must be a JSON object, got {values['facts']!r}.")
    if values["derived_from"] not in (None, *get_args(IntervalName)):
        raise ValueError(f"derived_from must be null or the name of a rule, got {values['derived_from']!r}.")
    count, certificates = values["count"], values["certificates"]
    if not isinstance(certificates, list) or type(count) is not int or count != len(certificates):
        raise ValueError(f"certificates must be a list of count={count!r} items.")
    classes = {len(item["estimation"]) for item in certificates}
    if len(classes) > 1:
        raise ValueError(f"All certificates must have the same number of classes, got {sorted(classes)}.")
