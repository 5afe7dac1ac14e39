"""unit (no root), storage (root, loop devices), lab (three nodes), faults (what may go wrong, by its number), bench."""
