"""TensorBoard event files, read by their form: length, checksum, message, checksum (TFRecord)."""

import importlib
import struct


def events(folder):
    """All events of a folder's files, in order; a file's last one that was cut off is left out."""
    Event = importlib.import_module("tensorboardX.proto.event_pb2").Event  # its names are made at run time
    checksum = importlib.import_module("tensorboardX.record_writer").masked_crc32c

    found = []
    for file in sorted(folder.glob("events.*")):
        data = file.read_bytes()
        while len(data) >= 12 and len(data) >= 16 + struct.unpack_from("<Q", data)[0]:
            length, of_length = struct.unpack_from("<QI", data)
            message, (of_message,) = data[12 : 12 + length], struct.unpack_from("<I", data, 12 + length)
            assert (checksum(data[:8]), checksum(message)) == (of_length, of_message)
            found.append(Event.FromString(message))
            data = data[16 + length :]
    return found


def figures(folder):
    """Name -> (step, number) of each scalar."""
    found = {}
    for event in events(folder):
        for value in event.summary.value:
            if value.WhichOneof("value") == "simple_value":
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found
