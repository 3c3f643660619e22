"""The program that trains: one file per axis, assembled in `program`."""
