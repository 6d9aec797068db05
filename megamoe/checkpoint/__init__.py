"""One sharded checkpoint for every layout: write, commit, verify, read any slice. numpy and xxhash, no torch."""
