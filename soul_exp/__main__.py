from soul_exp.distributed import interrupts


def main() -> None:
    interrupts.install()  # before the import, which takes seconds
    from soul_exp import cli

    cli.main()


if __name__ == "__main__":  # spawned workers import this module again
    main()
