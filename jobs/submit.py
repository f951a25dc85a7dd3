"""Run a job on a cluster: python -m jobs.submit JOB CONFIG key=value ... --address http://HEAD:8265"""

from rayclip.cli.submit import command

if __name__ == "__main__":
    command()
