"""exercises/: the solutions pass their graders, and the gaps fail each of them with a line that says so."""
from conftest import done, run


def test_solutions_pass_and_gaps_fail():
    done("-m pytest -q -p no:cacheprovider exercises --solutions")
    said = run("-m pytest -q -p no:cacheprovider exercises").stdout
    assert said.count("\nFAILED") == said.count("\nE   NotImplementedError") and " passed" not in said
    assert all(f"of exercise {number} is a gap" in said for number in range(1, 7))
