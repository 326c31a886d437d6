"""Forty small programming problems of our own, and whether a model's answer passes their tests.

A problem is a function's head with its docstring, and tests that the function must pass. An answer is Python that
others wrote: it runs in a process of its own, without the network where that can be had, in an empty folder, with a
bound of 5 s of processor time, 1 GB of memory and 1 MB of files.
"""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

SECONDS, MEMORY, FILES = 5, 1 << 30, 1 << 20
BLOCK = re.compile(r"```(?:python|py)?\s*\n(.*?)(?:```|\Z)", re.DOTALL)


class Problem(NamedTuple):
    head: str
    what: str
    tests: str

    @property
    def prompt(self) -> str:
        return (
            f'Complete this Python function. Answer with its code alone.\n\ndef {self.head}:\n    """{self.what}"""\n'
        )

    def passed(self, answer: str) -> bool:
        """Whether the code in an answer, in a block or all of it, passes."""
        found = BLOCK.search(answer)
        code = found[1] if found else answer
        if f"def {self.head.partition('(')[0]}(" not in code:  # it went on from the head
            code = f"def {self.head}:\n{code if code.startswith((' ', chr(9))) else '    ' + code}"
        return runs(f"{code}\n\n{self.tests}\n")


def runs(program: str) -> bool:
    """Whether it ends without an error."""
    alone = [unshare, "-r", "-n"] if (unshare := shutil.which("unshare")) else []
    if alone and subprocess.run([*alone, "true"], capture_output=True).returncode:
        alone = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [*alone, sys.executable, "-I", "-c", program], cwd=folder, env={}, stdin=subprocess.DEVNULL,
                capture_output=True, timeout=4 * SECONDS, preexec_fn=_bound,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


def _bound() -> None:
    for kind, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, FILES)):
        resource.setrlimit(kind, (most, most))


def _all(*rows: tuple[str, str, str]) -> tuple[Problem, ...]:
    return tuple(
        Problem(head, what, "\n".join(f"assert {test}" for test in tests.split("; "))) for head, what, tests in rows
    )


PROBLEMS = _all(
    ("is_even(n)", "Whether n is even.", "is_even(4); not is_even(7); is_even(0)"),
    (
        "last_word(text)",
        "The last word of a text, '' if it has none.",
        "last_word('a bc d') == 'd'; last_word('  ') == ''",
    ),
    (
        "vowels(text)",
        "How many vowels (aeiou, in any case) a text has.",
        "vowels('Education') == 5; vowels('xyz') == 0",
    ),
    ("factorial(n)", "The factorial of n, 1 for 0.", "factorial(0) == 1; factorial(6) == 720"),
    (
        "fibonacci(n)",
        "The first n Fibonacci numbers as a list, from 0, 1 on.",
        "fibonacci(6) == [0, 1, 1, 2, 3, 5]; fibonacci(1) == [0]; fibonacci(0) == []",
    ),
    (
        "is_palindrome(text)",
        "Whether a text is the same backwards, letters and digits alone and in any case.",
        "is_palindrome('A man, a plan, a canal: Panama'); not is_palindrome('abc')",
    ),
    (
        "unique(items)",
        "The items without repetitions, in the order in which they first came.",
        "unique([3, 1, 3, 2, 1]) == [3, 1, 2]; unique([]) == []",
    ),
    (
        "flatten(items)",
        "A flat list of a list that may hold lists, at any depth.",
        "flatten([1, [2, [3, []], 4]]) == [1, 2, 3, 4]; flatten([]) == []",
    ),
    (
        "chunks(items, size)",
        "The items in lists of size, the last of which may be shorter.",
        "chunks([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]; chunks([], 3) == []",
    ),
    ("gcd(a, b)", "The greatest common divisor of two positive integers.", "gcd(12, 18) == 6; gcd(7, 5) == 1"),
    ("is_prime(n)", "Whether n is a prime number.", "is_prime(2); is_prime(97); not is_prime(1); not is_prime(91)"),
    (
        "primes_below(n)",
        "All primes below n, ascending.",
        "primes_below(20) == [2, 3, 5, 7, 11, 13, 17, 19]; primes_below(2) == []",
    ),
    (
        "binary_search(items, x)",
        "The index of x in an ascending list, -1 if it is not there.",
        "binary_search([1, 3, 5, 7], 5) == 2; binary_search([1, 3], 4) == -1; binary_search([], 1) == -1",
    ),
    (
        "word_counts(text)",
        "A dict of how often each word, in lower case, comes in a text of words and spaces.",
        "word_counts('a B a') == {'a': 2, 'b': 1}; word_counts('') == {}",
    ),
    (
        "rotate(items, k)",
        "The list turned k places to the right; k may be larger than the list, which may be empty.",
        "rotate([1, 2, 3, 4], 1) == [4, 1, 2, 3]; rotate([1, 2], 5) == [2, 1]; rotate([], 3) == []",
    ),
    (
        "transpose(rows)",
        "The columns of a matrix of lists as lists.",
        "transpose([[1, 2], [3, 4], [5, 6]]) == [[1, 3, 5], [2, 4, 6]]",
    ),
    (
        "roman(n)",
        "n, from 1 to 3999, as a Roman numeral.",
        "roman(4) == 'IV'; roman(1994) == 'MCMXCIV'; roman(9) == 'IX'",
    ),
    (
        "from_roman(text)",
        "The number that a Roman numeral says.",
        "from_roman('XLII') == 42; from_roman('MCMXCIV') == 1994",
    ),
    (
        "balanced(text)",
        "Whether the brackets ()[]{} in a text are balanced and nested rightly.",
        "balanced('a(b[c]{})'); not balanced('(]'); not balanced('('); balanced('')",
    ),
    (
        "anagrams(words)",
        "The words in lists of anagrams, in the order of their first words.",
        "anagrams(['tea', 'tan', 'eat', 'nat', 'x']) == [['tea', 'eat'], ['tan', 'nat'], ['x']]",
    ),
    (
        "second_largest(items)",
        "The second largest of the different numbers in a list, None if there is none.",
        "second_largest([1, 5, 5, 3]) == 3; second_largest([2, 2]) is None",
    ),
    (
        "median(items)",
        "The median of a list of numbers that is not empty.",
        "median([3, 1, 2]) == 2; median([4, 1, 3, 2]) == 2.5",
    ),
    (
        "merge(a, b)",
        "One ascending list of two ascending lists.",
        "merge([1, 4], [2, 3, 5]) == [1, 2, 3, 4, 5]; merge([], [1]) == [1]",
    ),
    (
        "caesar(text, k)",
        "The text with each letter a to z and A to Z moved k places on in the alphabet, around its end.",
        "caesar('xyz, A', 3) == 'abc, D'; caesar('b', -2) == 'z'",
    ),
    (
        "run_lengths(text)",
        "A list of (character, count) for each run of the same character.",
        "run_lengths('aabccc') == [('a', 2), ('b', 1), ('c', 3)]; run_lengths('') == []",
    ),
    (
        "digit_sum(n)",
        "The sum of the decimal digits of an integer, which may be negative.",
        "digit_sum(1234) == 10; digit_sum(-56) == 11; digit_sum(0) == 0",
    ),
    (
        "to_binary(n)",
        "The binary digits of n >= 0 as a text, without a prefix.",
        "to_binary(10) == '1010'; to_binary(0) == '0'",
    ),
    (
        "common_prefix(words)",
        "The longest prefix that all words have, '' of an empty list.",
        "common_prefix(['flower', 'flow', 'flight']) == 'fl'; common_prefix([]) == ''; common_prefix(['a', 'b']) == ''",
    ),
    (
        "two_sum(items, total)",
        "The indexes (i, j), i < j, of two numbers whose sum is total, None if there are none.",
        "tuple(two_sum([2, 7, 11, 15], 9)) == (0, 1); two_sum([1, 2], 7) is None",
    ),
    (
        "max_subarray(items)",
        "The largest sum of a run of neighbours, of at least one number.",
        "max_subarray([-2, 1, -3, 4, -1, 2, 1, -5, 4]) == 6; max_subarray([-3, -1]) == -1",
    ),
    (
        "pascal(n)",
        "The first n rows of Pascal's triangle as lists.",
        "pascal(4) == [[1], [1, 1], [1, 2, 1], [1, 3, 3, 1]]; pascal(0) == []",
    ),
    (
        "title_case(text)",
        "Each word with a capital first letter and all others small, one space between words.",
        "title_case('hELLO  wORLD') == 'Hello World'; title_case('') == ''",
    ),
    (
        "edit_distance(a, b)",
        "The least number of insertions, deletions and substitutions that make b of a.",
        "edit_distance('kitten', 'sitting') == 3; edit_distance('', 'ab') == 2",
    ),
    (
        "snake_case(name)",
        "A camelCase or PascalCase name in snake_case.",
        "snake_case('camelCase') == 'camel_case'; snake_case('HttpServer') == 'http_server'; snake_case('x') == 'x'",
    ),
    (
        "power_set(items)",
        "All subsets of a list as a list of lists, in any order.",
        "sorted(map(sorted, power_set([1, 2]))) == [[], [1], [1, 2], [2]]; list(map(list, power_set([]))) == [[]]",
    ),
    (
        "valid_date(year, month, day)",
        "Whether there is such a day in the Gregorian calendar.",
        "valid_date(2024, 2, 29); not valid_date(2023, 2, 29); not valid_date(2024, 13, 1)",
    ),
    (
        "seconds(text)",
        "The seconds of a duration such as '1h30m', '45s' or '2h5s'.",
        "seconds('1h30m') == 5400; seconds('45s') == 45; seconds('2h5s') == 7205",
    ),
    (
        "invert(d)",
        "A dict from each value of d to the sorted list of the keys that have it.",
        "invert({'a': 1, 'b': 2, 'c': 1}) == {1: ['a', 'c'], 2: ['b']}; invert({}) == {}",
    ),
    (
        "spiral(rows)",
        "The numbers of a matrix clockwise from its upper left corner inwards.",
        "spiral([[1, 2, 3], [4, 5, 6], [7, 8, 9]]) == [1, 2, 3, 6, 9, 8, 7, 4, 5]; spiral([[1, 2]]) == [1, 2]",
    ),
    (
        "change(amount, coins)",
        "The least number of coins that make the amount, -1 if they cannot.",
        "change(11, [1, 2, 5]) == 3; change(3, [2]) == -1; change(0, [1]) == 0",
    ),
)
