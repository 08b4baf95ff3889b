"""Actuators: one seam, one file for each way to make a decision true."""
