from aigc.cli.main import main

main()
