"""Checkpoints: all state of a run, safe from a kill at any instant."""

from paceline.checkpoint.codec import decode, encode
from paceline.checkpoint.compatibility import check_fits
from paceline.checkpoint.engine import Checkpoint, CheckpointEngine, Notice, engine_class
from paceline.checkpoint.native_engine import NativeEngine, load_tree
from paceline.checkpoint.policy import CheckpointPolicy, reasons_due, to_keep
from paceline.checkpoint.publication import Manifest, read_manifest, scan, verify

__all__ = [
    "Checkpoint",
    "CheckpointEngine",
    "CheckpointPolicy",
    "Manifest",
    "NativeEngine",
    "Notice",
    "check_fits",
    "decode",
    "encode",
    "engine_class",
    "load_tree",
    "read_manifest",
    "reasons_due",
    "scan",
    "to_keep",
    "verify",
]
