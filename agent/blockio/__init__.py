"""The O_DIRECT copy path; nothing else in the agent opens a volume for its data.

buffers  aligned memory, and a bounded pool of it
queues   asynchronous reads, where the kernel allows them
device   one open device: reads and writes whole blocks past the page cache
scatter  many runs of one device, read by several threads, in order, in bounded memory
copy     one device onto another
"""
