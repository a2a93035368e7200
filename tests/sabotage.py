"""Break the store on purpose, one promise at a time: each time a test must turn red.

    python tests/sabotage.py [NAME ...]

Works on a copy of the package; exit status 1 if a sabotage goes unnoticed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Sabotage:
    """In `file`, `old` becomes `new`; then `tests` (a file and a -k expression) must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, str]


SABOTAGES = [
    Sabotage(
        "skip the digest", "store/entry.py",
        "if _digest((view[:-DIGEST_BYTES],), integrity_key) != bytes(view[-DIGEST_BYTES:]):", "if False:",
        ("test_store_entries.py", "flipped or sector"),
    ),
    Sabotage(
        "ignore the integrity key", "store/entry.py",
        "blake3(key=integrity_key)", "blake3()",
        ("test_store_entries.py", "integrity_key"),
    ),
    Sabotage(
        "skip the comparison of identities", "store/entry.py",
        "        check_identity(header, identity)\n", "        pass\n",
        ("test_store_entries.py", "any_other_identity"),
    ),
    Sabotage(
        "skip the token comparison", "store/entry.py",
        'hashlib.sha256(token_id_bytes(self.token_ids)).hexdigest()', '""',
        ("test_store_entries.py", "any_other_identity"),
    ),
    Sabotage(
        "skip the comparison of shapes", "store/codec.py",
        "    check_layout(header, layout)\n", "",
        ("test_store_entries.py", "describes_other_tensors"),
    ),
    Sabotage(
        "let tensors overlap", "store/codec.py",
        "if [*starts, len(data)] != [0, *stops]:", "if False:",
        ("test_store_entries.py", "made_up_payload"),
    ),
    Sabotage(
        "no bound for headers", "store/entry.py",
        "if header_length > MAX_HEADER_BYTES:", "if False:",
        ("test_store_entries.py", "beyond_its_bound"),
    ),
    Sabotage(
        "drop the namespace from the key", "recipe.py",
        "_framed(namespace.encode())", '_framed(b"")',
        ("test_namespaces.py", "its_own_entries or once_per_namespace"),
    ),
    Sabotage(
        "ids without the secret", "store/namespaces.py",
        "hmac.digest(_secret(folder / SECRET), data", 'hmac.digest(b"", data',
        ("test_namespaces.py", "secret"),
    ),
    Sabotage(
        "forget the precision in the recipe", "encoding.py",
        "storage_dtype=self.precision.name(model.dtype)", "storage_dtype=str(model.dtype)",
        ("test_identity.py", "only_its_own"),
    ),
    Sabotage(
        "believe that groups are exact", "encoding.py",
        "_groups_tried[self.model][kind] = all(", "_groups_tried[self.model][kind] = True or all(",
        ("test_groups.py", "differ_from_each_alone"),
    ),
    Sabotage(
        "let a group's chunk see too far", "attention.py",
        "row_mask, num_own = attention_mask, num_own", "row_mask, num_own = None, num_own",
        ("test_groups.py", "holds_what_each"),
    ),
    Sabotage(
        "teach by the base what a checkpoint knows better", "training/learner.py",
        "reader = self.model.reader if by_teacher or", "reader = self.model.reader if",
        ("test_start.py", "the_teacher_is"),
    ),
    Sabotage(
        "train links and ship them without their reader", "training/export.py",
        'copy_checkpoint(start, out, only="reader/")', "pass",
        ("test_start.py", "stays_as_it_is"),
    ),
    Sabotage(
        "forget the template in the recipe", "encoding.py",
        "chunk_template=template", 'chunk_template=""',
        ("test_identity.py", "only_its_own"),
    ),
    Sabotage(
        "turn by angles in half precision", "rope.py",
        "cos, sin = cos.float(), sin.float() * pairing.sign",
        "cos, sin = cos.half().float(), sin.half().float() * pairing.sign",
        ("test_probe.py", "thousand"),
    ),
    Sabotage(
        "round a turned key a third time", "rope.py",
        "            for side, partners in self.pairing.sides:\n",
        "            turned.copy_(turned.to(keys.dtype))\n            for side, partners in self.pairing.sides:\n",
        ("test_probe.py", "rounded_twice"),
    ),
    Sabotage(
        "do not sync the bytes", "store/kvdisk.py",
        "            os.fsync(descriptor)\n        finally:\n            os.close(descriptor)\n        os.rename",
        "            pass\n        finally:\n            os.close(descriptor)\n        os.rename",
        ("test_store_folder.py", "bytes_are_on_the_disk"),
    ),
    Sabotage(
        "rename before the sync", "store/kvdisk.py",
        "            os.fsync(descriptor)\n        finally:\n            os.close(descriptor)\n"
        "        os.rename(temporary, path)\n",
        "            os.rename(temporary, path)\n            os.fsync(descriptor)\n        finally:\n"
        "            os.close(descriptor)\n",
        ("test_store_folder.py", "bytes_are_on_the_disk"),
    ),
    Sabotage(
        "sweep without the lock", "store/disk.py",
        "self._writing(self._lock_wait_s if is_new else 0.0):", "contextlib.nullcontext():",
        ("test_store_folder.py", "at_work_are_not_swept"),
    ),
    Sabotage(
        "write without the lock", "store/lock.py",
        "        _acquire(descriptor, path, wait_s)\n", "",
        ("test_store_folder.py", "waits_in_vain"),
    ),
    Sabotage(
        "drop by key what was replaced", "store/disk.py",
        "if now is None or now == entry:", "if True:",
        ("test_store_folder.py", "written_anew"),
    ),
    Sabotage(
        "evict what was used last", "store/disk.py",
        "ORDER BY access_time LIMIT", "ORDER BY access_time DESC LIMIT",
        ("test_store_budget.py", "least_recently_used"),
    ),
    Sabotage(
        "write first, evict later", "store/disk.py",
        "over = self.size_bytes() + num_bytes - self.max_bytes", "over = self.size_bytes() - self.max_bytes",
        ("test_store_budget.py", "least_recently_used"),
    ),
    Sabotage(
        "hash on threads that a fork leaves behind", "store/entry.py",
        "blake3() if integrity_key is None", "blake3(max_threads=blake3.AUTO) if integrity_key is None",
        ("test_store_concurrency.py", "forked_child"),
    ),
    Sabotage(
        "let safetensors write, which aborts without memory", "store/codec.py",
        "*_payload(tensors, layout), integrity_key=",
        "__import__('safetensors.torch').torch.save(tensors), integrity_key=",
        ("test_store_unwritable.py", "without_memory"),
    ),
    Sabotage(
        "call damaged what there is no memory to read", "store/disk.py",
        'self._say("check", ', 'self._files.remove([key])\n                self._say("check", ',
        ("test_store_unwritable.py", "without_memory"),
    ),
    Sabotage(
        "leave what killed writers left", "store/disk.py",
        "if killed and self._cache is not None:", "if False:",
        ("test_store_budget.py", "leaves_that_is_killed"),
    ),
    Sabotage(
        "let children keep the lock", "store/lock.py",
        "    for descriptor in _open:\n        os.close(descriptor)\n", "",
        ("test_store_concurrency.py", "born_while"),
    ),
    Sabotage(
        "delete rows only", "store/files.py",
        "                    path.unlink(missing_ok=True)\n", "",
        ("test_store_folder.py", "delete_removes"),
    ),
    Sabotage(
        "delete what is finished only", "store/files.py",
        'self.of(key, (".kv", ".tmp"))', "self.of(key)",
        ("test_deletion.py", "nothing_of_a_deleted"),
    ),
    Sabotage(
        "encode whatever its length", "ingestion.py",
        "if longest > window else None", "if False else None",
        ("test_huge_documents.py", "longer_than"),
    ),
    Sabotage(
        "leave freed pages as they are", "store/kv_index.py",
        '"sqlite_secure_delete": 1', '"sqlite_secure_delete": 0',
        ("test_store_folder.py", "nothing_of_a_deleted"),
    ),
    Sabotage(
        "leave the vectors of what was deleted", "index.py",
        '            (self._folder / "index.faiss").unlink(missing_ok=True)', "            pass",
        ("test_index.py", "vectors"),
    ),
    Sabotage(
        "load pickles", "store/kvdisk.py",
        "        if read or mode != MODE_BINARY or value is not None:\n",
        "        if mode == 4:\n            return __import__('pickle').loads(value or "
        "Path(self._directory, filename).read_bytes())\n"
        "        if read or mode != MODE_BINARY or value is not None:\n",
        ("test_store_hostile.py", "pickle"),
    ),
    Sabotage(
        "believe any file name", "store/kvdisk.py",
        "if match is None or match[1] != match[2][:2]:", "if not isinstance(name, str):",
        ("test_store_hostile.py", "names_a_file_outside"),
    ),
    Sabotage(
        "follow links", "store/kvdisk.py",
        "os.O_RDONLY | _NO_FOLLOW", "os.O_RDONLY",
        ("test_store_hostile.py", "symlink"),
    ),
    Sabotage(
        "follow links in place of folders", "store/kvdisk.py",
        "        if path.parent.is_symlink():", "        if False:",
        ("test_store_place.py", "folder_of_entries"),
    ),
    Sabotage(
        "write through second names", "store/place.py",
        "return stat.S_ISREG(status.st_mode) and status.st_nlink == 1", "return True",
        ("test_store_place.py", "guessed and second_name"),
    ),
    Sabotage(
        "open what others may write", "store/place.py",
        "if mode & (stat.S_IWGRP | stat.S_IWOTH):", "if False:",
        ("test_store_place.py", "others_may_write"),
    ),
    Sabotage(
        "follow the name of a folder, not the folder", "store/place.py",
        "return (status.st_dev, status.st_ino) == self._identity", "return True",
        ("test_store_place.py", "replaced_by_a_link"),
    ),
    Sabotage(
        "map entry files", "store/kvdisk.py",
        "        view = read_buffers.take(size)", "        return memoryview(__import__('mmap').mmap("
        "file.fileno(), size, prot=1))\n        view = read_buffers.take(size)",
        ("test_store_concurrency.py", "files_cut"),
    ),
    Sabotage(
        "lend memory that is still used", "store/buffers.py",
        "        weakref.finalize(lent, self._kept.append, block).atexit = False", "        self._kept.append(block)",
        ("test_buffers.py", "lent_again"),
    ),
    Sabotage(
        "read over what a KV still shows", "store/buffers.py",
        "        weakref.finalize(lent, self._kept.append, block).atexit = False", "        self._kept.append(block)",
        ("test_buffers.py", "read_after_it"),
    ),
    Sabotage(
        "overwrite entries in place", "store/kvdisk.py",
        '        name = f"{key[:2]}/{key}.{secrets.token_hex(8)}.kv"\n'
        "        publish(Path(self._directory, name), value)\n",
        '        name = f"{key[:2]}/{key}.{16 * str(0)}.kv"\n        path = Path(self._directory, name)\n'
        "        path.parent.mkdir(exist_ok=True)\n        path.write_bytes(value)\n",
        ("test_store_concurrency.py", "an_evictor"),
    ),
    Sabotage(
        "sweep beside writers", "store/disk.py",
        "        with self._writing():\n            return self._expire() + reconcile",
        "        with NO_FORK:\n            return self._expire() + reconcile",
        ("test_store_concurrency.py", "checking_and_sweeping"),
    ),
    Sabotage(
        "call damaged whose time is over", "store/disk.py",
        "if not self._is_missing(key):", "if key not in set(self.keys()):",
        ("test_store_folder.py", "calls_nothing_damaged"),
    ),
    Sabotage(
        "check the index in passing", "store/kv_index.py",
        "PRAGMA integrity_check(1)", "PRAGMA quick_check(1)",
        ("test_store_index.py", "flipped_bits"),
    ),
    Sabotage(
        "take nothing in that a killed writer left", "store/kv_index.py",
        "and _adopt(cache, path, key, name, ttl_s):", "and not path and _adopt(cache, path, key, name, ttl_s):",
        ("test_store_concurrency.py", "dictionary"),
    ),
    Sabotage(
        "evict more than is needed", "store/disk.py",
        "                    over -= size\n", "                    over -= size // 2\n",
        ("test_store_concurrency.py", "dictionary"),
    ),
    Sabotage(
        "serve from memory what was deleted elsewhere", "store/kv_store.py",
        "        if key not in self._entries:\n", "        if False:\n",
        ("test_memory.py", "another_process"),
    ),
    Sabotage(
        "keep all in memory", "store/memory.py",
        "while self.size_bytes > self.max_bytes:", "while False:",
        ("test_memory.py", "budget"),
    ),
    Sabotage(
        "take for one what was read behind other soft tokens", "encoding.py",
        "soft_tokens=embeddings_digest(soft_tokens)", 'soft_tokens=""',
        ("test_soft_tokens.py", "never_answered_from"),
    ),
    Sabotage(
        "encode for every question", "kv_source.py",
        "if not (reuse and source.is_stored(ids))", "if True",
        ("test_single_flight.py", "fifty"),
    ),
    Sabotage(
        "keep to oneself what went wrong", "compute.py",
        "            self._error = error\n", "            pass\n",
        ("test_single_flight.py", "first_fails"),
    ),
    Sabotage(
        "use unpacked what is stored packed", "kv_source.py",
        "encoded[wanted[number]] = kv = self._kvs.at_rest(computed)",
        "kv = self._kvs.at_rest(computed)\n            encoded[wanted[number]] = computed",
        ("test_precision.py", "same_answer"),
    ),
]  # fmt: skip


def is_noticed(sabotage: Sabotage) -> bool:
    """Whether the tests turn red on a sabotaged copy."""
    with tempfile.TemporaryDirectory(prefix="kvlink-sabotage-") as folder:
        for name in ("kvlink_rag", "tests"):
            shutil.copytree(ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        path = Path(folder, "kvlink_rag", sabotage.file)
        text = path.read_text("utf-8")
        assert text.count(sabotage.old) == 1, f"{sabotage.name}: not found once in {sabotage.file}"
        path.write_text(text.replace(sabotage.old, sabotage.new), "utf-8")
        file, expression = sabotage.tests
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            f"tests/{file}",
            "-k",
            expression,
        ]
        environment = {**os.environ, "PYTHONPATH": folder}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise AssertionError(f"{sabotage.name}: pytest did not run\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done.returncode == 1


if __name__ == "__main__":
    chosen = [sabotage for sabotage in SABOTAGES if not sys.argv[1:] or sabotage.name in sys.argv[1:]]
    unnoticed = []
    for sabotage in chosen:
        noticed = is_noticed(sabotage)
        print(f"{'noticed' if noticed else 'UNNOTICED':>10}  {sabotage.name}", flush=True)
        unnoticed += [] if noticed else [sabotage.name]
    print(f"{len(chosen) - len(unnoticed)} of {len(chosen)} noticed")
    sys.exit(bool(unnoticed))
