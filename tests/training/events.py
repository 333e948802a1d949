"""TensorBoard event files, read by their form: length, checksum, message, checksum (TFRecord)."""

import importlib
import struct


def events(folder):
    """All events of a folder's files, in order."""
    Event = importlib.import_module("tensorboardX.proto.event_pb2").Event  # its names are made at run time

    found = []
    for file in sorted(folder.glob("events.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def figures(folder):
    """Name -> (step, number) of each scalar."""
    found = {}
    for event in events(folder):
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found
