"""Errors a person may see. Each message is one line: what is wrong, where, and the mend. All are picklable, so they cross Ray unchanged."""

from __future__ import annotations


class OxyrayError(Exception):
    """Base of all errors that OxyRay raises on purpose; the command line prints its message alone, without a traceback."""


class Stopped(OxyrayError):
    """The work was asked to end early (SIGTERM) and did, with everything saved; says how to go on. No failure: the exit code is 0."""


class ConfigError(OxyrayError):
    """The configuration cannot work: unknown key, wrong type, impossible combination."""


class DataError(OxyrayError):
    """Input tables or files break the contract: missing column, wrong type, corrupted file, too many bad rows."""


class CatalogueError(OxyrayError):
    """Semantic IDs and items do not fit each other or the model: wrong version, wrong width, unknown item."""


class RunError(OxyrayError):
    """A run folder lacks what a stage needs, or holds something that does not fit."""


class ClusterError(OxyrayError):
    """Ray cannot be started or reached, or a process that it ran is gone."""


class TrainingError(OxyrayError):
    """Training cannot go on: a worker died too often, a loss is not finite, a wait passed its limit."""


class GenerationError(OxyrayError):
    """Generation cannot give a legal result: an empty pool, a beam without children."""


class RewardError(OxyrayError):
    """A reward cannot be computed: names the component, the request and the candidate. It is never replaced by a zero."""
