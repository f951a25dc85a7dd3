"""Settings of what a job takes of the cluster."""

from pydantic import Field, model_validator

from rayclip.config.base import Config


class WorkersConfig(Config):
    """What a job of many independent parts takes of the cluster."""

    num_workers: int = Field(1, gt=0, description="processes, each with a copy of the model")
    cpus_per_worker: float = Field(1, gt=0, description="CPU cores of each; as many threads decode beside the model")
    use_gpu: bool = Field(False, description="one GPU for each")

    @property
    def device(self) -> str:
        """What a worker computes on, as torch calls it."""
        return "cuda" if self.use_gpu else "cpu"


class ClusterConfig(Config):
    """What a run takes of the cluster."""

    num_workers: int | tuple[int, int] = Field(
        1, description="DDP processes; [LEAST, MOST]: as many as the cluster has room for, as nodes come and go"
    )
    resize_every_s: float = Field(60, gt=0, description="how often a run with [LEAST, MOST] looks for room to grow")
    cpus_per_worker: float = Field(1, gt=0, description="CPU cores of each")
    use_gpu: bool = Field(False, description="one GPU for each")
    max_failures: int = Field(3, ge=-1, description="restarts after a crash before the run fails; -1 has no limit")

    @model_validator(mode="after")
    def _in_order(self) -> "ClusterConfig":
        if not 1 <= self.min_workers <= self.max_workers:
            raise ValueError(f"num_workers {self.num_workers} must be at least 1, and [LEAST, MOST] in that order")
        return self

    @property
    def min_workers(self) -> int:
        """Fewest workers that the run goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Most workers that the run ever has."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]
