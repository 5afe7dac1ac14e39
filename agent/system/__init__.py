"""The only door to the operating system: programs, clock, durable files, raw system calls, failpoints.

run        programs of the operating system: argument lists, a time limit, their own words kept
clock      wall and monotonic time
files      write-temp, fsync, rename, fsync-directory
reach      whether a TCP connection can be opened
handles    open a file by inode number; open beneath a directory and nowhere else
ioctl      the ioctls Landfall needs, each with its source
priority   of a thread's I/O
failpoint  named places where a test makes the process die, raise or wait
"""
