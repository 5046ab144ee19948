"""The commands of a bash script with their variables filled in, without running anything.

What launch scripts consist of is understood: assignments, arrays, ``export``, line continuations, quotes, ``$NAME``,
``${NAME:-default}``, ``${ARRAY[@]}``, ``$((arithmetic))``, here-documents, comments. Every branch of an ``if`` or
``case`` is read, so the last assignment counts. What only a run could tell (command substitution, variables from
outside) stays in the words as it is written, ``$NAME``.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

_NAME = re.compile(r"[A-Za-z_]\w*")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_BEFORE_COMMANDS = ("then", "else", "do", "{", "!", "time", "if", "elif", "while", "until")
_DECLARATIONS = ("export", "local", "declare", "readonly", "typeset")
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Mod: operator.mod,
}


def commands_of(script: str, given: Mapping[str, str] | None = None) -> list[list[str]]:
    """Every command of a script as words, in order; ``given`` are variables from outside."""
    return _Shell(script, given or {}).run()


class _Shell:
    def __init__(self, script: str, given: Mapping[str, str]) -> None:
        self._text = script.replace("\\\r\n", "").replace("\r\n", "\n").replace("\\\n", "")
        self._at = 0
        self._given = given
        self._values: dict[str, str] = dict(given)
        self._arrays: dict[str, list[str]] = {}
        self._commands: list[list[str]] = []
        self._here_documents: list[str] = []

    def run(self) -> list[list[str]]:
        words: list[str] = []
        skip_word = False
        while self._at < len(self._text):
            char = self._text[self._at]
            if char in " \t":
                self._at += 1
            elif char == "#":
                self._at = self._end_of_line()
            elif char in "\n;|&()<>":
                skip_word = self._separator(words) or skip_word
                if char in "\n;|&()" and not skip_word:
                    words = []
            else:
                if not words and self._assignment():
                    continue
                found = self._word()
                if skip_word:
                    skip_word = False
                    continue
                if not words and found and (found[0] in _BEFORE_COMMANDS or found[0] in _DECLARATIONS):
                    continue
                words += found
        self._end_command(words)
        return self._commands

    def _separator(self, words: list[str]) -> bool:
        """Pass what is between commands or redirects one; True if the next word is a file's name."""
        if match := re.compile(r"<<-?\s*(['\"]?)(\w+)\1").match(self._text, self._at):
            self._here_documents.append(match[2])
            self._at = match.end()
            return False
        if match := re.compile(r"(&>>?|[<>]&\d?-?|<<<|>>|[<>]\|?)").match(self._text, self._at):
            if words and words[-1].isdigit() and self._text[self._at - 1].isdigit():
                words.pop()  # the 2 of 2>
            self._at = match.end()
            return not re.search(r"&[\d-]", match[0])
        is_newline = self._text[self._at] == "\n"
        self._end_command(words)
        self._at += 1
        if is_newline:
            while self._here_documents:
                self._skip_here_document(self._here_documents.pop(0))
        return False

    def _end_command(self, words: list[str]) -> None:
        if words:
            self._commands.append(list(words))

    def _end_of_line(self) -> int:
        end = self._text.find("\n", self._at)
        return len(self._text) if end < 0 else end

    def _skip_here_document(self, delimiter: str) -> None:
        while self._at < len(self._text):
            end = self._end_of_line()
            line = self._text[self._at : end].strip()
            self._at = end + 1
            if line == delimiter:
                return

    def _assignment(self) -> bool:
        match = _ASSIGNMENT.match(self._text, self._at)
        if match is None:
            return False
        name, adds = match[1], bool(match[2])
        self._at = match.end()
        if self._text.startswith("(", self._at):
            self._at += 1
            items = self._array_items()
            self._arrays[name] = [*self._arrays.get(name, []), *items] if adds else items
            return True
        ends = self._at >= len(self._text) or self._text[self._at] in " \t\n;|&()"
        value = "" if ends else " ".join(self._word(splits=False))
        if name not in self._given:
            self._values[name] = self._values.get(name, "") + value if adds else value
        return True

    def _array_items(self) -> list[str]:
        items: list[str] = []
        while self._at < len(self._text):
            char = self._text[self._at]
            if char == ")":
                self._at += 1
                break
            if char in " \t\n":
                self._at += 1
            elif char == "#":
                self._at = self._end_of_line()
            else:
                items += self._word()
        return items

    def _word(self, splits: bool = True) -> list[str]:
        """One word, which expansions outside quotes may turn into several or none."""
        fields: list[str] = [""]
        is_quoted = False

        def add(parts: list[str]) -> None:
            if parts:
                fields[-1] += parts[0]
                fields.extend(parts[1:])

        while self._at < len(self._text) and self._text[self._at] not in " \t\n;|&()<>":
            char = self._text[self._at]
            if char == "'":
                end = self._text.find("'", self._at + 1)
                end = len(self._text) if end < 0 else end
                fields[-1] += self._text[self._at + 1 : end]
                self._at, is_quoted = end + 1, True
            elif char == '"':
                self._at, is_quoted = self._at + 1, True
                while self._at < len(self._text) and self._text[self._at] != '"':
                    if re.match(r'\\["\\$`]', self._text[self._at : self._at + 2]):
                        fields[-1] += self._text[self._at + 1]
                        self._at += 2
                    elif self._text[self._at] in "$`":
                        add(self._expansion(quoted=True))
                    else:
                        fields[-1] += self._text[self._at]
                        self._at += 1
                self._at += 1
            elif char == "\\":
                fields[-1] += self._text[self._at + 1 : self._at + 2]
                self._at += 2
            elif char in "$`":
                parts = self._expansion(quoted=False)
                if splits:
                    text = "\0".join(parts)
                    pieces = re.split(r"[ \t\n\0]+", text)
                    add(pieces)
                else:
                    add([" ".join(parts)])
            else:
                fields[-1] += char
                self._at += 1
        if not is_quoted:
            fields = [field for field in fields if field]
        return fields

    def _expansion(self, quoted: bool) -> list[str]:
        """What stands at ``$`` or a backtick, expanded; the text itself where only a run could tell."""
        text, start = self._text, self._at
        if text[start] == "`":
            end = text.find("`", start + 1)
            self._at = len(text) if end < 0 else end + 1
            return [text[start : self._at].replace(" ", "\u00a0")]
        if text.startswith("$((", start):
            end = text.find("))", start)
            self._at = len(text) if end < 0 else end + 2
            return [self._arithmetic(text[start + 3 : end], text[start : self._at])]
        if text.startswith("$(", start):
            self._at = self._closing(start + 1, "(", ")")
            return [text[start : self._at].replace(" ", "\u00a0")]
        if text.startswith("${", start):
            self._at = self._closing(start + 1, "{", "}")
            return self._braced(text[start + 2 : self._at - 1], text[start : self._at], quoted)
        match = _NAME.match(text, start + 1)
        if match is None:
            # $1, $@, $$ and the like; a lone dollar.
            self._at = start + (2 if text[start + 1 : start + 2] in "0123456789@*#?$!-" else 1)
            return [text[start : self._at]]
        self._at = match.end()
        return [self._value(match[0], text[start : self._at])]

    def _closing(self, opening: int, left: str, right: str) -> int:
        depth = 0
        for at in range(opening, len(self._text)):
            depth += {left: 1, right: -1}.get(self._text[at], 0)
            if depth == 0:
                return at + 1
        return len(self._text)

    def _value(self, name: str, written: str) -> str:
        if name in self._values:
            return self._values[name]
        return self._arrays[name][0] if self._arrays.get(name) else written

    def _braced(self, inside: str, written: str, quoted: bool) -> list[str]:
        if match := re.fullmatch(r"(\w+)\[([@*]|\d+)\]", inside):
            items = self._arrays.get(match[1])
            if items is None:
                return [self._value(match[1], written)]
            if match[2].isdigit():
                return [items[int(match[2])]] if int(match[2]) < len(items) else [""]
            return [" ".join(items)] if match[2] == "*" and quoted else list(items)
        if match := re.fullmatch(r"(\w+)(:?[-=])(.*)", inside, re.DOTALL):
            value = self._values.get(match[1])
            if value is None or (not value and match[2].startswith(":")):
                # The default may be made of variables itself.
                value = " ".join(word for words in commands_of(f'x "{match[3]}"', self._values) for word in words[1:])
                value = value or match[3].strip("\"'")
                if "=" in match[2]:
                    self._values[match[1]] = value
            return [value]
        if _NAME.fullmatch(inside):
            return [self._value(inside, written)]
        return [written]

    def _arithmetic(self, expression: str, written: str) -> str:
        names = re.sub(r"\$\{?(\w+)\}?", r"\1", expression)
        filled = _NAME.sub(lambda match: self._values.get(match[0], match[0]), names)
        try:
            return str(_evaluate(ast.parse(filled.strip(), mode="eval").body))
        except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, TypeError):
            return written.replace(" ", "")


def _evaluate(node: ast.AST) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_evaluate(node.operand)
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, (ast.Div, ast.FloorDiv)):
            return int(left / right)  # bash cuts towards zero
        if type(node.op) in _ARITHMETIC:
            return int(_ARITHMETIC[type(node.op)](left, right))
    raise ValueError("not plain integer arithmetic")
