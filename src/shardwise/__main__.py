"""`python -m shardwise` is the command `shardwise`."""

from shardwise.cli import command

if __name__ == "__main__":
    command()
