"""A module that notes each of its imports (used by test_launch)."""

import os

with open(os.environ["MEGAMOE_TEST_IMPORTS"], "a") as file:
    file.write(f"{os.getpid()}\n")
os.environ["MEGAMOE_TEST_SET_BY_IMPORT"] = "yes"
