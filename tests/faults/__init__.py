"""Faults made for real under a running daemon: disks, S3 on the wire, strangers on the socket."""
