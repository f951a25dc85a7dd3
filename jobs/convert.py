"""Convert weights between formats: python -m jobs.convert INPUT OUTPUT format=rayclip|open_clip|huggingface"""

from rayclip.cli.convert import command

if __name__ == "__main__":
    command()
