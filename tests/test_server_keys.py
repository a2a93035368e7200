"""Keys are read from a file, and a public address needs one."""

from __future__ import annotations

import pytest

from kvlink_rag.errors import BadInput
from kvlink_rag.server.keys import Keys
from kvlink_rag.server.run import check_address


def test_a_public_address_needs_a_key():
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.org", ""):
        with pytest.raises(BadInput, match="--api-key-file"):
            check_address(host, None)
        check_address(host, Keys({"a-key-of-team-one": "one"}))
    for host in ("127.0.0.1", "::1", "localhost", "127.9.9.9"):
        check_address(host, None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no key"),
        ("short", "16"),
        ("a-key-of-team-one One!", "namespace"),
        ("a-key-of-team-one one more", "namespace"),
        ("a-key-of-team-one\na-key-of-team-one", "twice"),
    ],
)
def test_a_key_file_with_a_mistake_is_refused_by_line(tmp_path, text, says):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(BadInput, match=says) as raised:
        Keys.read(tmp_path / "keys")
    assert "a-key-of" not in str(raised.value)


def test_keys_are_read_with_comments_and_namespaces(tmp_path):
    (tmp_path / "keys").write_text("# ours\na-key-of-team-one one\n\na-key-of-nobody-else  # the public one\n")
    keys = Keys.read(tmp_path / "keys")
    assert keys.namespaces == ["one", "public"]
    assert keys.namespace("Bearer a-key-of-team-one") == "one"
    assert keys.namespace("bearer a-key-of-nobody-else") == "public"
    assert keys.namespace("a-key-of-team-one") is keys.namespace("") is None
    with pytest.raises(BadInput, match="cannot be read"):
        Keys.read(tmp_path / "none")


def test_a_key_that_holds_the_sign_of_comments_is_taken_whole(tmp_path):
    (tmp_path / "keys").write_text("Zk3vQ9x!pL7w2Rt8#mN5bYc1 one #two\n")
    keys = Keys.read(tmp_path / "keys")
    assert keys.namespace("Bearer Zk3vQ9x!pL7w2Rt8#mN5bYc1") == "one"
    assert keys.namespace("Bearer Zk3vQ9x!pL7w2Rt8") is None
