"""A griffe extension: `field(metadata={"help": ...})` describes a dataclass field, in `--help` as in the reference."""

import ast

import griffe


class FieldHelp(griffe.Extension):
    """Append to the docstring of a dataclass a list of its fields, with help and default."""

    def on_class_members(self, *, node, cls, **kwargs):
        fields = {}
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.value, ast.Call):
                options = {keyword.arg: keyword.value for keyword in line.value.keywords}
                if "metadata" in options:
                    fields[line.target.id] = options
        if not (fields and cls.docstring):
            return
        lines = ["", "", "Attributes:"]
        for name, options in fields.items():
            text = ast.literal_eval(options["metadata"])["help"]
            default = f" (default: `{ast.unparse(options['default'])}`)" if "default" in options else ""
            lines.append(f"    {name}: {text[0].upper()}{text[1:]}{default}.")
        cls.docstring.value += "\n".join(lines)
