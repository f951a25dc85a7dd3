"""S3 on loopback that goes wrong, as the benchmark has it."""

from jobs.benchmarks.faulty_s3 import FaultyProxy

__all__ = ["FaultyProxy"]
