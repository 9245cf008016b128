from bench.transfer import TransferFigure, measure, report


def test_measures_both_ways_between_processes() -> None:
    (figure,) = measure({1_000_001: 2})
    assert figure.num_bytes == 1_000_001
    assert 0 < figure.checksum < figure.grpc
    assert figure.tcp > 0
    assert figure.tls > figure.checksum


def test_the_table_shows_speeds_and_their_ratio() -> None:
    table = report([TransferFigure(16 << 20, tcp=0.008, grpc=0.016, tls=0.032, checksum=0.001)])
    _, row = table.splitlines()
    assert " ".join(row.split()) == "16 MiB 2.10 GB/s 1.05 GB/s 0.52 GB/s 0.50 0.50 1.0 of 16.0 ms"
