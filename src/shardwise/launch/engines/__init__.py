"""Launchers that a team already has, one file each: how their workers know their ranks, and how a job is started."""
