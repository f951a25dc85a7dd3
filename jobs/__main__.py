"""List the jobs, a line each."""

from rayclip.cli.main import JOBS, describe_command

if __name__ == "__main__":
    for name in (*JOBS, "submit"):
        print(f"python -m jobs.{name:<10} {describe_command(name)}")
