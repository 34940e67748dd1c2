"""Six exercises, each a file with gaps and a grader. See README.md in this folder."""
