"""The journal keeps whole records and nothing else."""

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omnilmm.batch.journal import Segment, SegmentReader, read_segment, read_segments, segment_path, segment_tokens
from omnilmm.files.blobs import StorageFull


def write(folder, token, *numbers):
    with Segment(folder, token) as segment:
        return [segment.append(n, b'{"n":%d}' % n, is_success=n % 2 == 0) for n in numbers]


def test_what_was_appended_is_read_back(tmp_path):
    written = write(tmp_path, 1, 5, 2, 9)
    records, length = read_segment(tmp_path, 1)
    assert records == written
    assert length == segment_path(tmp_path, 1).stat().st_size
    with SegmentReader(tmp_path) as reader:
        assert [reader.read(record) for record in records] == [b'{"n":5}', b'{"n":2}', b'{"n":9}']
    assert [record.is_success for record in records] == [False, True, False]


def test_every_cut_ends_at_a_whole_record(tmp_path):
    write(tmp_path, 1, 1, 2, 3)
    path = segment_path(tmp_path, 1)
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        records, length = read_segment(tmp_path, 1)
        assert length == max([end for end in ends if end <= cut], default=0)
        assert [record.number for record in records] == [1, 2, 3][: len(records)]


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_ends_the_segment_there(tmp_path_factory, position, bit):
    folder = tmp_path_factory.mktemp("journal")
    write(folder, 1, 1, 2, 3)
    path = segment_path(folder, 1)
    content = bytearray(path.read_bytes())
    position %= len(content)
    content[position] ^= 1 << bit
    path.write_bytes(content)
    records, _ = read_segment(folder, 1)
    intact = content[:position].count(b"\n")
    assert [record.number for record in records] == [1, 2, 3][:intact]


def test_what_comes_after_the_seal_does_not_count(tmp_path):
    write(tmp_path, 1, 1, 2)
    sealed = {1: read_segment(tmp_path, 1)[1]}
    with segment_path(tmp_path, 1).open("ab") as zombie:
        zombie.write(segment_path(tmp_path, 1).read_bytes().replace(b" 1 ", b" 3 "))
    write(tmp_path, 4, 3)
    sealed[4] = read_segment(tmp_path, 4)[1]
    found = read_segments(tmp_path, sealed)
    assert {number: record.token for number, record in found.items()} == {1: 1, 2: 1, 3: 4}
    assert segment_tokens(tmp_path) == [1, 4]


def test_the_first_record_of_a_line_counts(tmp_path):
    write(tmp_path, 1, 7)
    write(tmp_path, 2, 7, 8)
    found = read_segments(tmp_path, {1: 10**6, 2: 10**6})
    assert (found[7].token, found[8].token) == (1, 2)


def test_two_workers_cannot_write_one_segment(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(FileExistsError):
        Segment(tmp_path, 1)


def test_a_full_disk_leaves_no_half_record(tmp_path):
    """A file-size limit, in a child of its own: the same errors as a full disk, without needing one."""
    code = (
        "import pathlib, resource, sys\n"
        "from omnilmm.batch.journal import Segment\n"
        "from omnilmm.files.blobs import StorageFull\n"
        "segment = Segment(pathlib.Path(sys.argv[1]), 1)\n"
        "segment.append(1, b'x' * 600, is_success=True)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    segment.append(2, b'y' * 600, is_success=True)\n"
        "except StorageFull:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "    segment.append(3, b'z' * 600, is_success=True)\n"
        "    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], check=False, capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr
    assert [record.number for record in read_segment(tmp_path, 1)[0]] == [1, 3]


def test_a_short_write_is_completed(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:5]))
    write(tmp_path, 1, 1, 2)
    monkeypatch.undo()
    assert [record.number for record in read_segment(tmp_path, 1)[0]] == [1, 2]


def test_a_write_that_fails_half_way_is_undone(tmp_path, monkeypatch):
    real, calls = os.write, []

    def fail_second(descriptor, data):
        calls.append(data)
        if len(calls) % 2 == 0:
            raise OSError(28, "full")
        return real(descriptor, data[:5])

    with Segment(tmp_path, 1) as segment:
        segment.append(1, b"{}", is_success=True)
        monkeypatch.setattr(os, "write", fail_second)
        with pytest.raises(StorageFull):
            segment.append(2, b"{}", is_success=True)
        monkeypatch.undo()
        segment.append(3, b"{}", is_success=True)
    assert [record.number for record in read_segment(tmp_path, 1)[0]] == [1, 3]
