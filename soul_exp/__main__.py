import signal

from soul_exp import interrupts


def main() -> None:
    interrupts.install()  # before the import, which takes seconds
    from soul_exp import cli

    cli.main()


if __name__ == "__main__":
    main()
elif __name__ == "__mp_main__":  # a spawned worker, whose launcher speaks: a terminal's Ctrl-C reaches both
    signal.signal(signal.SIGINT, signal.SIG_DFL)
