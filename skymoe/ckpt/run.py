"""`skymoe ckpt ls | verify | diff`. Print a report with `skymoe.ckpt.table.show`, or `report.as_json()`."""

from __future__ import annotations

from skymoe.ckpt.config import DiffConfig, LsConfig, VerifyConfig
from skymoe.ckpt.result import DiffReport, LsReport, VerifyReport


def run_ls(config: LsConfig) -> LsReport:
    """The generations in `config.path`, newest first, without reading their tensors."""
    raise NotImplementedError


def run_verify(config: VerifyConfig) -> VerifyReport:
    """Read every byte in `config.path` and compare it with its hash."""
    raise NotImplementedError


def run_diff(config: DiffConfig) -> DiffReport:
    """Compare two states tensor by tensor and document by document."""
    raise NotImplementedError
