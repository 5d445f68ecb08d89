"""Checkpoints: all state of a run, safe from a kill at any instant."""

from paceline.checkpoint.codec import decode, encode
from paceline.checkpoint.engine import (
    Checkpoint,
    CheckpointEngine,
    Notice,
    engine_class,
    engine_of,
    recorded_engine,
)
from paceline.checkpoint.fits import check_fits
from paceline.checkpoint.manager import Checkpoints, load_tree
from paceline.checkpoint.policy import NATIVE, CheckpointPolicy, reasons_due, to_keep
from paceline.checkpoint.publication import Manifest, read_manifest, scan, verify

__all__ = [
    "NATIVE",
    "Checkpoint",
    "CheckpointEngine",
    "CheckpointPolicy",
    "Checkpoints",
    "Manifest",
    "Notice",
    "check_fits",
    "decode",
    "encode",
    "engine_class",
    "engine_of",
    "load_tree",
    "read_manifest",
    "reasons_due",
    "recorded_engine",
    "scan",
    "to_keep",
    "verify",
]
