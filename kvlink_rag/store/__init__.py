"""Stored KV: entry bytes (`entry`, `codec`), the folder they live in (`kvdisk`, `disk`), and KVs by token ids."""
