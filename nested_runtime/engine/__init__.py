"""The synchronous engine: scheduling, packed steps, updates. One thread, no I/O, no asyncio."""
