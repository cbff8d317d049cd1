from lib.study.command import leave, main

if __name__ == "__main__":
    leave(main())
