#!/bin/sh
# Writes the jobs beside this file for epsilon 1, 3 and 8 into a folder: sh examples/private/variants.sh FOLDER
set -e
mkdir -p "$1"
for job in "$(dirname "$0")"/*.toml; do
  name=$(basename "$job" .toml)
  for epsilon in 1 3 8; do
    rate=$(sed -n 's/^learning_rate = //p' "$job")
    case $name-$epsilon in
      digits-example-lora-1) rate=1 ;;
      digits-example-lora-8) rate=4 ;;
      digits-example-ffa-lora-1) rate=2 ;;
      digits-example-ffa-lora-8) rate=16 ;;
      digits-example-fed-sb-1) rate=4 ;;
    esac
    sed "s/^name = \"$name\"/name = \"$name-$epsilon\"/
      s/^epsilon = .*/epsilon = $epsilon/
      s/^learning_rate = .*/learning_rate = $rate/" "$job" > "$1/$name-$epsilon.toml"
  done
done
