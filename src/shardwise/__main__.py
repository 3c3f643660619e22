"""Run the command `shardwise` as `python -m shardwise`."""

from shardwise.starting import leave_out_working_directory

if __name__ == "__main__":
    leave_out_working_directory()  # before the imports below could load a module from it
    from shardwise.cli import command

    command()
