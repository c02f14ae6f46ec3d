"""`haori`: the commands, and the one place where errors become a sentence and an exit code.

Exit codes: 0 done; 1 a run, verification or merge failed; 2 what was given cannot be used; 130 and 143 stopped
by SIGINT or SIGTERM.
"""

import logging
import sys

import typer

from haori.cli import (
    bases,
    blend,
    classify,
    compare,
    data,
    generate,
    import_config,
    jobs,
    keys,
    library,
    measure,
    rate,
    serve,
    sweep,
    training,
    use,
    worker,
)

__all__ = ["app", "main"]

app = typer.Typer(
    name="haori",
    help="LoRA from raw data to production: train, prove, measure, keep and use adapters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich's would take half of the time to start
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(measure.demo)
app.command("train")(training.train)
app.command("schema")(training.schema)
app.command("import-config")(import_config.import_config)
app.command("sweep")(sweep.sweep)
app.command("compare")(compare.compare)
app.command("evaluate")(measure.evaluate)
app.command("chat")(use.chat)
app.command("generate")(generate.generate)
app.command("rate")(rate.rate)
app.command("generate-text")(use.generate_text)
app.command("classify")(classify.classify)
app.command("merge")(use.merge)
app.command("blend")(blend.blend)
app.command("resize")(blend.resize)
app.command("extract")(blend.extract)
app.command("serve")(serve.serve)
app.command("worker")(worker.worker)
app.add_typer(data.app, name="data")
app.add_typer(bases.app, name="bases")
app.add_typer(library.app, name="library")
app.add_typer(keys.app, name="keys")
app.add_typer(jobs.app, name="jobs")


@app.callback(epilog="haori --version prints the version.")
def _root() -> None:
    """LoRA from raw data to production: train, prove, measure, keep and use adapters."""


def main() -> None:
    """Run the command line and exit."""
    # A global option would make typer import pydantic before it prints any help: half of the time to start.
    if sys.argv[1:] in (["--version"], ["-V"]):
        from importlib.metadata import version

        typer.echo(f"haori {version('haori')}")
        return
    # bitsandbytes, which PEFT imports where it is installed, warns of a kernel that is not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except Exception as error:
        from haori.core.errors import HaoriError

        if isinstance(error, OSError) and error.filename is not None:
            typer.echo(f"Error: {str(error.filename)!r} cannot be used: {error.strerror}.", err=True)
            sys.exit(2)
        if not isinstance(error, HaoriError):
            raise
        typer.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
