"""Plan a training: model, samples, days, loaders and cost: python -m jobs.plan CONFIG key=value ..."""

from rayclip.cli.plan import command

if __name__ == "__main__":
    command()
