"""What the scripted model tells coding agents to do: run one command, and report its output."""

SHELLS = {"Bash": "command", "exec_command": "cmd", "shell_command": "command"}  # the parameter of each shell tool
COMMAND = "echo openmimo-$((6 * 7))"
OUTPUT = "openmimo-42"  # not part of the command, so only an agent that runs the command knows it


def shell_in(tools: list[str]) -> str:
    """The shell tool among the names of tools; empty if there is none."""
    return next((name for name in SHELLS if name in tools), "")


def next_turn(prompt: str, shell: str) -> str:
    """The call of the shell tool, or the report if the prompt contains the command's output."""
    if OUTPUT in prompt:
        return f"The command printed {OUTPUT}."
    parameter = f"<parameter={SHELLS[shell]}>{COMMAND}</parameter>"
    return f"<tool_call>\n<function={shell}>\n{parameter}\n</function>\n</tool_call>"
