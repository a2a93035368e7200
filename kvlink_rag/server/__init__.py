"""HTTP: an OpenAI-compatible chat over stored KV, its documents, and one page. Needs the extra `server`."""
