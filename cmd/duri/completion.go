package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func newCompletionCmd(a *app) *cobra.Command {
	shells := []string{"bash", "zsh", "fish", "powershell"}
	return &cobra.Command{
		Use:   "completion SHELL",
		Short: "Print the script that completes duri's commands in a shell",
		Example: `  source <(duri completion bash)
  duri completion zsh > "${fpath[1]}/_duri"`,
		Long:      "SHELL is bash, zsh, fish or powershell. Load the script in the shell's start-up file.",
		ValidArgs: shells,
		Args:      oneOf("shell", shells...),
		RunE: func(cmd *cobra.Command, args []string) error {
			root := cmd.Root()
			switch args[0] {
			case "bash":
				return root.GenBashCompletionV2(a.stdout, true)
			case "zsh":
				return root.GenZshCompletion(a.stdout)
			case "fish":
				return root.GenFishCompletion(a.stdout, true)
			case "powershell":
				return root.GenPowerShellCompletionWithDesc(a.stdout)
			}
			return fmt.Errorf("no completion for shell %q", args[0])
		},
	}
}
